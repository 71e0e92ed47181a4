//! Feeds the front-end checker (`--check-front-end`) and reports its findings. Without the flag there is no checker,
//! and each call costs one test for it. Judges nothing itself.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use device_model::addr::ByteRange;
use device_model::mmu::miss::{Outcome, Resolution};
use device_model::session::Refusal;
use device_model::session::miss_port::Waiter;

use super::state::SessionState;
use crate::front_end_check::{FrontEndCheck, Severity, World};
use crate::vhost_user::Header;
use crate::vhost_user::peek::{self, Next};
use crate::vhost_user::session_end::SessionEnd;

impl SessionState {
    /// Checks the front-end from its first message on. `miss_timeout` is its time limit for an answer.
    pub fn check_front_end(&mut self, miss_timeout: Duration) {
        self.front_end_check = Some(FrontEndCheck::new(self.core.offer(), miss_timeout));
    }

    /// The message at the head of the socket is handled next.
    pub(super) fn judge_message(
        &mut self,
        now: Duration,
        socket: &UnixStream,
        header: Header,
    ) -> io::Result<()> {
        if let Some(front_end_check) = &mut self.front_end_check {
            let world = World { memory: &self.memory, mirror: self.core.mirror() };
            front_end_check.message(now, header, &peek::payload(socket, header)?, world);
        }
        Ok(())
    }

    /// Why the last message was refused, if it was.
    pub(super) fn take_refusal(&mut self) -> Option<Refusal> {
        let refusal = self.refusal.take()?;
        if let Some(front_end_check) = &mut self.front_end_check {
            front_end_check.refused(self.scheduler.now(), &crate::error::chain(&refusal));
        }
        Some(refusal)
    }

    /// A MISS was settled, and the mirror has not been updated yet.
    pub(super) fn judge_answer(&mut self, now: Duration, resolution: &Resolution<Waiter>) {
        let Some(front_end_check) = &mut self.front_end_check else { return };
        match resolution.outcome {
            Outcome::TimedOut => front_end_check.miss_timed_out(now, resolution.request),
            // The front-end was judged when the channel was lost.
            Outcome::NoChannel => {}
            Outcome::Mapped { .. } | Outcome::Refused | Outcome::NotCovered => {
                front_end_check.miss_resolved(now, resolution, self.core.mirror());
            }
        }
    }

    /// The mirror was emptied for a reason of MirrorGPU's own.
    pub(super) fn forget_suspicions(&mut self) {
        if let Some(front_end_check) = &mut self.front_end_check {
            front_end_check.mirror_emptied(ByteRange::everything());
        }
    }

    /// Judges what can be judged by now, and reports the findings. `idle`: no reply to the front-end is pending.
    pub(super) fn judge_front_end(&mut self, now: Duration, socket: &UnixStream, idle: bool) {
        let Some(front_end_check) = &mut self.front_end_check else { return };
        // Everything that was sent before an answer on the other socket has arrived by now.
        let all_is_read = || matches!(peek::next(socket), Ok(Next::Empty | Next::Closed));
        if front_end_check.wants_empty_socket() && idle && all_is_read() {
            front_end_check.main_socket_empty(now);
        }
        front_end_check.expire(now);
        self.tell_findings();
    }

    /// The session has ended.
    pub(super) fn judge_end(&mut self, end: &SessionEnd) {
        if let Some(front_end_check) = &mut self.front_end_check {
            front_end_check.ended(self.scheduler.now(), end);
            self.tell_findings();
        }
    }

    fn tell_findings(&mut self) {
        let Some(front_end_check) = &mut self.front_end_check else { return };
        for finding in front_end_check.take() {
            match finding.rule.row().severity {
                Severity::Certain => self.stats.findings_certain.add(1),
                Severity::Likely => self.stats.findings_likely.add(1),
                Severity::Note => self.stats.findings_noted.add(1),
            }
            // The reporter names and prints it: this thread has to serve the front-end.
            self.sink.instruments().finding(finding);
        }
    }
}
