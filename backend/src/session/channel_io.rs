//! The session's I/O on the back-end channel: reads answers, sends MISSes. [`device_model::session`] decides what they
//! mean.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use device_model::addr::{ByteRange, PAGE_SIZE};
use device_model::mmu::Missing;
use device_model::session::Settled;
use device_model::session::miss_port::{MissRequest, Waiter};
use log::warn;

use super::state::SessionState;
use crate::fault_injection::Bug;
use crate::vhost_user::channel::{Channel, ChannelError};
use crate::vhost_user::peek;

impl SessionState {
    /// Installs a new back-end channel.
    pub(super) fn replace_channel(&mut self, channel: Channel) {
        if let Some(front_end_check) = &mut self.front_end_check {
            front_end_check.channel_replaced();
        }
        self.channel = Some(channel);
    }

    /// Reads the answers that have arrived on the back-end channel.
    pub(super) fn read_answers(&mut self, now: Duration) {
        while let Some(channel) = &mut self.channel {
            match channel.next_answer() {
                Ok(Some(granted)) => self.take_answer(now, granted),
                Ok(None) => return,
                Err(e) => self.lose_channel(now, &e),
            }
        }
    }

    /// Handles the answer to the oldest MISS.
    fn take_answer(&mut self, now: Duration, granted: bool) {
        if let Some(front_end_check) = &mut self.front_end_check {
            front_end_check.miss_answered(now, granted);
        }
        match self.core.channel_answered(now, granted) {
            Ok(settled) => settled.into_iter().for_each(|settled| self.settle(now, settled)),
            Err(_) => self.lose_channel(now, &ChannelError::Unasked),
        }
    }

    /// A miss is settled: the front-end checker judges the answer, then the mirror takes it.
    pub(super) fn settle(&mut self, now: Duration, settled: Settled) {
        self.judge_answer(now, settled.resolution());
        self.core.apply(now, settled);
        // The waiters are notified, and faults are injected into the mirror, before the next answer is read.
        self.carry_out(now);
    }

    /// Settles the misses that were not answered in time.
    pub(super) fn expire_misses(&mut self, now: Duration, main: &UnixStream) {
        // A MISS may be unread or, on the main socket, the ack of the UPDATE that precedes an answer.
        let channel = &self.channel;
        let has_unread = || channel.as_ref().is_some_and(Channel::is_unread) || peek::is_unread(main);
        for settled in self.core.expire(now, has_unread) {
            self.settle(now, settled);
        }
    }

    /// Sends as many misses as the channel accepts.
    pub(super) fn send_misses(&mut self, now: Duration) {
        self.take_requests(now);
        let Some(channel) = &mut self.channel else { return };
        if let Err(e) = channel.flush() {
            return self.lose_channel(now, &e);
        }
        while let Some(channel) = self.channel.as_mut().filter(|channel| channel.is_ready()) {
            let Some(miss) = self.core.next_miss(now) else { return };
            if let Some(front_end_check) = &mut self.front_end_check {
                front_end_check.miss_sent(now, miss);
            }
            if let Err(e) = channel.send_miss(miss.iova, miss.access) {
                return self.lose_channel(now, &e);
            }
        }
    }

    /// Takes the miss requests of the other threads.
    fn take_requests(&mut self, now: Duration) {
        while let Some(request) = self.core.next_request() {
            self.faults.hold_back(now, request);
        }
        while let Some(request) = self.faults.due(now) {
            if self.injection.is_on(Bug::RefuseMiss) && matches!(request.waiter, Waiter::Job(_)) {
                self.refuse_some(now, request);
            } else {
                self.core.ask(now, request);
            }
        }
        self.carry_out(now);
    }

    /// `--inject refuse-miss`: decided page by page, because it may apply to some of them only.
    fn refuse_some(&mut self, now: Duration, request: MissRequest) {
        let MissRequest { missing, waiter } = request;
        for iova in missing.pages() {
            let Ok(range) = ByteRange::new(iova, PAGE_SIZE) else { continue };
            let page = MissRequest { missing: Missing { range, ..missing }, waiter };
            if self.injection.fires(Bug::RefuseMiss) {
                self.core.refuse(now, page);
            } else {
                self.core.ask(now, page);
            }
        }
    }

    /// Without a channel, no outstanding miss will be answered.
    fn lose_channel(&mut self, now: Duration, error: &ChannelError) {
        if let Some(front_end_check) = &mut self.front_end_check {
            front_end_check.channel_failed(now, error);
        }
        warn!("The back-end channel is gone, no translation can be asked for any more: {error}");
        self.channel = None;
        for settled in self.core.channel_lost() {
            self.settle(now, settled);
        }
    }
}
