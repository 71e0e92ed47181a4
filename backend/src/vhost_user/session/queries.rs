//! What the control thread asks of the session, which has the tables and the misses. Answers are given in bounded
//! pieces, one a turn, when nothing else is to be done sooner; no other thread is waited for.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use device_model::addr::{Iova, SpaceId};
use device_model::telemetry::audit::AuditReport;
use serde_json::{Value, json};

use super::state::SessionState;
use crate::telemetry::instruments::query_channel::{Connected, IotlbList, Question};

/// Table entries that are looked at in one turn: about 10 µs.
const ENTRIES_A_TURN: usize = 4096;

/// A list of the mirror that is being made.
struct Listing {
    list: IotlbList,
    most: usize,
    from: Iova,
    answer: Sender<IotlbList>,
}

/// Queries, and what is being done about them.
pub struct Queries {
    mail: Receiver<Question>,
    /// In the order in which they get their turns.
    listings: VecDeque<Listing>,
    /// Until this is dropped, the control thread may ask.
    _connected: Connected,
}

impl Queries {
    /// None yet.
    pub fn new(mail: Receiver<Question>, connected: Connected) -> Self {
        Self { mail, listings: VecDeque::new(), _connected: connected }
    }

    /// When there is something to be done next.
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        (!self.listings.is_empty()).then_some(now)
    }
}

impl SessionState {
    /// Answers what was asked, as far as it goes in one turn.
    pub(super) fn answer_queries(&mut self, now: Duration) {
        // Bounded: every client of the control socket has one question at a time.
        while let Ok(question) = self.queries.mail.try_recv() {
            match question {
                Question::Iotlb(most, answer) => {
                    let list = IotlbList::default();
                    self.queries.listings.push_back(Listing { list, most, from: Iova::new(0), answer });
                }
                Question::Misses(most, answer) => {
                    let pending = self.core.misses().pending().take(most);
                    let pending = pending.map(|(request, waiters)| (request, waiters.to_vec()));
                    // The client may have given up, here and below.
                    let _ = answer.send(pending.collect());
                }
                Question::Audit(answer) => {
                    self.core.begin_audit(now);
                    self.carry_out(now);
                    let _ = answer.send(());
                }
            }
        }
        self.list_some();
        self.core.continue_audit(now);
        self.carry_out(now);
    }

    /// Goes on with one list: each gets a turn after those that were asked for before it.
    fn list_some(&mut self) {
        let Some(mut listing) = self.queries.listings.pop_front() else { return };
        let Listing { list, most, from, .. } = &mut listing;
        let next = self.core.mirror().mapped_some(SpaceId::DEVICE, *from, ENTRIES_A_TURN, |range| {
            // What was cut where the last turn ended is put together again.
            let joined = list.ranges.last_mut().is_some_and(|last| last.append(&range));
            if !joined && list.ranges.len() < *most {
                list.ranges.push(range);
            } else {
                list.truncated |= !joined;
            }
        });
        match next.filter(|_| !list.truncated) {
            Some(next) => {
                listing.from = next;
                self.queries.listings.push_back(listing);
            }
            None => drop(listing.answer.send(listing.list)),
        }
    }

    /// An audit has come this far.
    pub(super) fn audit_progress(&self, report: AuditReport) {
        let mut news = self.sink.instruments().query_channel.audit();
        (news.running, news.report) = (true, Some(report));
    }

    pub(super) fn audit_ended(&self, report: AuditReport) {
        let instruments = self.sink.instruments();
        let result = audit_json(&report);
        {
            let mut news = instruments.query_channel.audit();
            (news.running, news.report) = (false, Some(report));
        }
        // A client that hears of it finds it.
        instruments.outbox.send("AUDIT_DONE", result);
    }
}

/// The findings of an audit for tools.
pub fn audit_json(report: &AuditReport) -> Value {
    let findings = report.findings.iter();
    let stale: Vec<_> = findings
        .map(|finding| json!({"range": finding.range, "access": finding.access, "found": finding.stale}))
        .collect();
    json!({
        "checked": report.checked,
        "stale": stale,
        "more": report.more,
        "unanswered": report.unanswered,
        "interrupted": report.interrupted,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use device_model::addr::{ByteRange, PAGE_SIZE};
    use device_model::mmu::{HostRange, Permissions};
    use device_model::telemetry::stats::Stats;

    use super::*;
    use crate::telemetry::instruments::Instruments;
    use crate::vhost_user::session::start::{DeviceSettings, start};
    use crate::wake::Waker;

    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE as usize]);

    /// The turns after which the lists are complete that ask for so many ranges, all at once and in this order. One turn
    /// does not get through the ranges of the mirror.
    fn turns_until_answered(most: &[usize]) -> Vec<usize> {
        let (settings, stats) = (DeviceSettings::for_tests(), Arc::new(Stats::default()));
        let instruments = Instruments::start(settings.engines, None, Arc::clone(&stats)).unwrap();
        let mut state = start(&settings, &stats, &instruments, &Waker::new().unwrap()).unwrap();
        let mut page = Box::new(Page([0; PAGE_SIZE as usize]));
        // SAFETY: nothing looks at what these translations lead to, and the page outlives them.
        let host = unsafe { HostRange::new(page.0.as_mut_ptr(), page.0.len()) };
        for index in 0..ENTRIES_A_TURN as u64 * 5 / 2 {
            // A gap after each page keeps the ranges apart.
            let range = ByteRange::new(Iova::new(2 * index * PAGE_SIZE), PAGE_SIZE).unwrap();
            state
                .core
                .mirror_mut()
                .map(SpaceId::DEVICE, range, host, Permissions { read: true, write: true })
                .map(drop)
                .unwrap();
        }
        let connection = instruments.query_channel.connection().unwrap();
        let ask = |most: &usize| {
            let (sender, answer) = channel();
            connection.session.send(Question::Iotlb(*most, sender)).unwrap();
            answer
        };
        let answers: Vec<_> = most.iter().map(ask).collect();
        let mut turns = vec![0; most.len()];
        for turn in 1..100 {
            state.answer_queries(Duration::ZERO);
            for (answer, turns) in answers.iter().zip(&mut turns) {
                if answer.try_recv().is_ok() {
                    *turns = turn;
                }
            }
        }
        turns
    }

    #[test]
    fn lists_are_answered_in_the_order_in_which_they_were_asked_for() {
        let turns = turns_until_answered(&[usize::MAX; 3]);
        assert!(turns.is_sorted() && turns[0] > 1, "{turns:?}");
    }

    #[test]
    fn a_short_list_does_not_wait_for_the_end_of_a_long_one() {
        let turns = turns_until_answered(&[usize::MAX, 1]);
        assert!(turns[1] == 2 && turns[0] > 2, "{turns:?}");
    }
}
