//! Locks whose holder may have panicked. A thread that panics ends its session, and the other threads have to end it in
//! an orderly way: a poisoned lock must not make them panic too.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose critical sections leave no invalid state behind after a panic, so that poisoning can be ignored.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_whose_holder_has_panicked_can_still_be_taken() {
        let mutex = Mutex::new(7);
        let holder = std::thread::scope(|scope| {
            let panics = || {
                let _held = lock(&mutex);
                panic!("while the lock is held");
            };
            scope.spawn(panics).join()
        });
        assert!(holder.is_err() && mutex.is_poisoned());
        assert_eq!(*lock(&mutex), 7);
    }
}
