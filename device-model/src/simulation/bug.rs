//! Seeded bugs: known ways to get it wrong, one at a time, to prove that the simulation would notice. They are played
//! by the simulation's driver, where the real one calls the model; the model itself has no hook for them.

/// What the device does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// An INVALIDATE is acked before its drain.
    AckBeforeDrain,
    /// A drain waits for sections, and forgets the pins.
    ForgetPins,
    /// A drain waits for pins, and forgets the sections.
    ForgetSections,
    /// An invalidation leaves what the mirror has of its range.
    DropZap,
    /// A translation is cached with the permission that the UPDATE claims.
    CacheClaimedPermission,
    /// A staged UPDATE survives an INVALIDATE of its range.
    KeepStagedUpdate,
    /// A drain waits for the ends of jobs, however long that takes.
    ForgetLadder,
    /// A job that waits for a translation holds on to the ones that it has.
    HoldAndWait,
    /// The wake-up of a parked ack is lost.
    LoseDrainWakeUp,
    /// The jobs that wait for the end of an invalidation are not told.
    LoseInvalidationEnd,
    /// The answer to a miss does not reach the job that waits.
    LoseMissAnswer,
    /// A miss that was granted fails the job that waits for it.
    FailWhatWasGranted,
    /// A job that is taken off by a stop is lost.
    LoseJobOverStop,
    /// What a job has copied out of its pin is used after the pin was evicted.
    StalePinAfterEviction,
    /// The memory table is changed before its drain.
    SwapMemoryBeforeDrain,
    /// An engine goes on with a job from before a reset.
    RunOnAfterReset,
    /// A job that the old device starts between a reset and its hearing of it is kept.
    KeepJobsOverReset,
    /// A reset leaves the responses to the old driver's commands, and they go out.
    AnswerAfterReset,
    /// A job is said to be done one step before it is.
    SignalBeforeWrite,
    /// A response is written twice.
    CompleteTwice,
    /// A response is not written.
    LoseCompletion,
    /// Two responses with fences overtake each other.
    ReorderFences,
    /// What was mapped where is compared with what is found there after the memory table has changed.
    RememberWhatWasThere,
    /// A job that is cancelled in a SPIN writes its user fence in the same step, before which nobody has asked whether it
    /// has to leave.
    FenceWithSpin,
    /// The time of a WAIT goes on while the device is stopped.
    WaitOverStop,
    /// A job that is to be killed is not, and goes on.
    SkipKill,
    /// A context whose job has failed takes further jobs.
    KeepLostContext,
    /// A SIGNAL overtakes what was written before it.
    SignalBeforeItsData,
    /// A job goes on with the translation that a section before has found, though it is not there any more.
    StaleTranslation,
    /// A change of the memory table, or a stop, does not wait for registration caches.
    CacheKeepsPins,
    /// A SIGNAL, or a user fence, is not written.
    LoseStore,
    /// An ATOMIC adds twice.
    RepeatAtomic,
    /// A WAIT does not look again at its time.
    ForgetToLookAgain,
    /// A context or a buffer is given back before the jobs that use it have ended.
    GiveBackEarly,
    /// What an INVALIDATE takes away is noted only when it is gone.
    SuspectAfterZap,
    /// Memory that was moved is said to be what it was.
    CallMovedBenign,
    /// A fence is told before anybody knows what the INVALIDATEs under its job meant.
    TellFenceUnchecked,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 37] = [
        Self::AckBeforeDrain,
        Self::ForgetPins,
        Self::ForgetSections,
        Self::DropZap,
        Self::CacheClaimedPermission,
        Self::KeepStagedUpdate,
        Self::ForgetLadder,
        Self::HoldAndWait,
        Self::LoseDrainWakeUp,
        Self::LoseInvalidationEnd,
        Self::LoseMissAnswer,
        Self::FailWhatWasGranted,
        Self::LoseJobOverStop,
        Self::StalePinAfterEviction,
        Self::SwapMemoryBeforeDrain,
        Self::RunOnAfterReset,
        Self::KeepJobsOverReset,
        Self::AnswerAfterReset,
        Self::SignalBeforeWrite,
        Self::CompleteTwice,
        Self::LoseCompletion,
        Self::ReorderFences,
        Self::RememberWhatWasThere,
        Self::FenceWithSpin,
        Self::WaitOverStop,
        Self::SkipKill,
        Self::KeepLostContext,
        Self::SignalBeforeItsData,
        Self::StaleTranslation,
        Self::CacheKeepsPins,
        Self::LoseStore,
        Self::RepeatAtomic,
        Self::ForgetToLookAgain,
        Self::GiveBackEarly,
        Self::SuspectAfterZap,
        Self::CallMovedBenign,
        Self::TellFenceUnchecked,
    ];
}
