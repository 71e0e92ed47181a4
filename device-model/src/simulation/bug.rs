//! Seeded bugs: known errors, one at a time, to prove that the simulation would find them. The simulation's driver
//! plays them where the real one calls the model; the model itself has no hooks for them.

/// The seeded error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// An INVALIDATE is acked before its drain.
    AckBeforeDrain,
    /// A drain waits for sections, but not for pins.
    ForgetPins,
    /// A drain waits for pins, but not for sections.
    ForgetSections,
    /// An invalidation leaves its range in the mirror.
    DropZap,
    /// A translation is cached with the permission that the UPDATE claims.
    CacheClaimedPermission,
    /// A staged UPDATE survives an INVALIDATE of its range.
    KeepStagedUpdate,
    /// A drain waits for jobs to end, without a timeout.
    ForgetLadder,
    /// A job that waits for a translation keeps its pins.
    HoldAndWait,
    /// The wake-up of a parked ack is lost.
    LoseDrainWakeUp,
    /// Jobs that wait for the end of an invalidation are not woken.
    LoseInvalidationEnd,
    /// The answer to a miss does not reach the waiting job.
    LoseMissAnswer,
    /// A granted miss fails the waiting job.
    FailWhatWasGranted,
    /// A job that a stop preempts is lost.
    LoseJobOverStop,
    /// The translations of a pin are used after it was evicted.
    StalePinAfterEviction,
    /// The memory table is changed before its drain.
    SwapMemoryBeforeDrain,
    /// An engine continues a job from before a reset.
    RunOnAfterReset,
    /// A job that the old device starts between a reset and its notification is kept.
    KeepJobsOverReset,
    /// A reset keeps the responses to the old driver's commands, and they are sent.
    AnswerAfterReset,
    /// A job is reported as done one step too early.
    SignalBeforeWrite,
    /// A response is written twice.
    CompleteTwice,
    /// A response is lost.
    LoseCompletion,
    /// Two responses with fences are sent in the wrong order.
    ReorderFences,
    /// Mappings from before a change of the memory table are compared with those after it.
    RememberWhatWasThere,
    /// A job that is cancelled in a SPIN writes its user fence in the same step, without a check of whether the job has
    /// to leave.
    FenceWithSpin,
    /// The timeout of a WAIT runs on while the device is stopped.
    WaitOverStop,
    /// A job that has to be killed goes on.
    SkipKill,
    /// A context whose job has failed accepts further jobs.
    KeepLostContext,
    /// A SIGNAL becomes visible before what was written before it.
    SignalBeforeItsData,
    /// A job uses a translation from an earlier section after it was invalidated.
    StaleTranslation,
    /// A change of the memory table, or a stop, does not wait for registration caches.
    CacheKeepsPins,
    /// A SIGNAL, or a user fence, is not written.
    LoseStore,
    /// An ATOMIC adds twice.
    RepeatAtomic,
    /// A WAIT misses its next poll.
    ForgetToLookAgain,
    /// A context or a buffer is released before the jobs that use it have ended.
    GiveBackEarly,
    /// What an INVALIDATE takes is noted only after the zap.
    SuspectAfterZap,
    /// Memory that was moved is judged as benign.
    CallMovedBenign,
    /// A fence is signalled before the INVALIDATEs under its job are judged.
    TellFenceUnchecked,
}

impl Bug {
    /// All seeded bugs.
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
