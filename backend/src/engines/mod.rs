//! The engine threads: [`engine`] steps the jobs that [`device_model::jobs::scheduler`] hands out, [`starvation`] tells an
//! engine that is stuck from one that the host does not schedule.

pub mod engine;
pub(crate) mod starvation;
