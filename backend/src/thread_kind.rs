//! The kinds of threads of the process. Each has a list of system calls of its own (`sandbox`).

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadKind {
    /// The main thread, which serves the sessions.
    Session,
    /// The queue thread.
    Queue,
    /// An engine.
    Engine,
    /// The thread that owns the display socket.
    Display,
    /// The thread that answers late questions to the display.
    DisplayClock,
    /// The thread of the control socket.
    Control,
    /// The thread that prints reports and writes traces.
    Reporter,
}

impl ThreadKind {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::Session,
        Self::Queue,
        Self::Engine,
        Self::Display,
        Self::DisplayClock,
        Self::Control,
        Self::Reporter,
    ];

    /// Its name: that of the thread, except for the main thread and for the number of an engine.
    pub fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Queue => "queue",
            Self::Engine => "engine",
            Self::Display => "display",
            Self::DisplayClock => "display-clock",
            Self::Control => "control",
            Self::Reporter => "reporter",
        }
    }
}
