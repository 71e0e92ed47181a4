//! The engine threads: [`engine`] steps jobs, [`scheduler`] hands them out, [`starvation`] tells an engine that is stuck from one that the host does not schedule.

pub mod engine;
pub mod scheduler;
pub(crate) mod starvation;
