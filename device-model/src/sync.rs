//! The primitives of concurrent code: std, or loom when it is model-checked (`--cfg loom`). Everything in a protocol
//! between threads comes from here; what only one thread ever writes may be plain std.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, fence},
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, fence},
};

pub(crate) use std::sync::atomic::Ordering;

#[cfg(not(loom))]
pub(crate) use crate::locking::lock;

/// As [`crate::locking::lock`], in a model.
#[cfg(loom)]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> loom::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
