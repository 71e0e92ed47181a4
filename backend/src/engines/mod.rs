//! The engine threads: [`engine`] steps jobs, [`scheduler`] hands them out, [`miss_port`] takes what they miss to the
//! session, [`starvation`] tells an engine that is stuck from one that the host does not schedule.

pub mod engine;
pub mod miss_port;
pub mod scheduler;
pub(crate) mod starvation;
