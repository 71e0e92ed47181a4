//! The big lock: a fair mutex, because otherwise a thread that flushes in a loop would starve the one that serves
//! misses. Knows nothing of what it protects.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A lock that is handed over first come, first served.
#[derive(Debug)]
pub struct TurnLock<T> {
    queue: Mutex<Queue>,
    moved: Condvar,
    value: Mutex<T>,
}

#[derive(Debug, Default)]
struct Queue {
    next_ticket: u64,
    now_serving: u64,
}

impl<T> TurnLock<T> {
    /// A lock around `value`.
    pub fn new(value: T) -> Self {
        Self { queue: Mutex::default(), moved: Condvar::new(), value: Mutex::new(value) }
    }

    /// Waits for all earlier requests, and takes the lock.
    pub fn lock(&self) -> Turn<'_, T> {
        let mut queue = held(&self.queue);
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        let wait = |queue: &mut Queue| queue.now_serving != ticket;
        drop(self.moved.wait_while(queue, wait).unwrap_or_else(PoisonError::into_inner));
        Turn { value: Some(held(&self.value)), lock: self }
    }
}

/// The lock, held.
#[derive(Debug)]
pub struct Turn<'a, T> {
    // Always `Some` until the drop, which releases it before it calls the next one.
    value: Option<MutexGuard<'a, T>>,
    lock: &'a TurnLock<T>,
}

impl<T> Deref for Turn<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("a turn has its value until it is dropped")
    }
}

impl<T> DerefMut for Turn<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("a turn has its value until it is dropped")
    }
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        self.value = None;
        held(&self.lock.queue).now_serving += 1;
        self.lock.moved.notify_all();
    }
}

/// Locks a mutex whose holder may have panicked: a test that failed must not turn all others into poison errors.
pub fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn a_thread_that_takes_the_lock_in_a_loop_lets_others_in() {
        let lock = Arc::new(TurnLock::new((0_u64, false)));
        let greedy = {
            let lock = lock.clone();
            thread::spawn(move || {
                loop {
                    let mut turn = lock.lock();
                    turn.0 += 1;
                    if turn.1 {
                        return;
                    }
                }
            })
        };
        while lock.lock().0 < 1000 {}
        lock.lock().1 = true;
        greedy.join().unwrap();
    }
}
