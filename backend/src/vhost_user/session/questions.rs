//! What the control thread asks of the session, which has the tables and the misses. Answers are given in bounded
//! pieces, one a turn, when nothing else is to be done sooner; nobody is waited for. Audits are driven from here.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use device_model::addr::{Iova, SpaceId};
use device_model::mmu::Invalidation;
use device_model::mmu::miss::{Outcome, Requested};
use device_model::telemetry::audit::{Audit, AuditReport};
use device_model::telemetry::record::Event;
use serde_json::{Value, json};

use super::state::SessionState;
use crate::telemetry::instruments::query_channel::{Connected, IotlbList, Question};
use device_model::session::miss_port::Waiter;

/// Table entries that are looked at in one turn: about 10 µs.
const ENTRIES_A_TURN: usize = 4096;

/// A list of the mirror that is being made.
struct Listing {
    list: IotlbList,
    most: usize,
    from: Iova,
    answer: Sender<IotlbList>,
}

/// Questions, and what is being done about them.
pub struct Questions {
    mail: Receiver<Question>,
    /// In the order in which they get their turns.
    listings: VecDeque<Listing>,
    audit: Option<Audit>,
    /// Until this is dropped, the control thread may ask.
    _connected: Connected,
}

impl Questions {
    /// None yet.
    pub fn new(mail: Receiver<Question>, connected: Connected) -> Self {
        Self { mail, listings: VecDeque::new(), audit: None, _connected: connected }
    }

    /// The audit that is under way.
    pub fn audit(&mut self) -> Option<&mut Audit> {
        self.audit.as_mut()
    }

    /// When there is something to be done next.
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        let listing = (!self.listings.is_empty()).then_some(now);
        [listing, self.audit.as_ref().and_then(Audit::deadline)].into_iter().flatten().min()
    }
}

impl SessionState {
    /// Answers what was asked, as far as it goes in one turn.
    pub fn answer_questions(&mut self, now: Duration) {
        // Bounded: every client of the control socket has one question at a time.
        while let Ok(question) = self.questions.mail.try_recv() {
            match question {
                Question::Iotlb(most, answer) => {
                    let list = IotlbList::default();
                    self.questions.listings.push_back(Listing { list, most, from: Iova::new(0), answer });
                }
                Question::Misses(most, answer) => {
                    let pending = self.misses.pending().take(most);
                    let pending = pending.map(|(request, waiters)| (request, waiters.to_vec()));
                    // Whoever asked may have given up, here and below.
                    let _ = answer.send(pending.collect());
                }
                Question::Audit(answer) => {
                    self.begin_audit(now);
                    let _ = answer.send(());
                }
            }
        }
        self.list_some();
        self.audit_some(now);
    }

    /// An ack has to wait: for what, as far as that can be told.
    pub(super) fn record_parked(&self, number: u64, invalidation: &Invalidation) {
        let in_flight = invalidation.in_flight();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (sections, pins) = (count(in_flight.sections), count(in_flight.pins));
        let job = self.scheduler.first_in(SpaceId::DEVICE, invalidation.range());
        self.sink.record(Event::Parked { number, sections, pins, job });
    }

    /// Goes on with one list: each gets a turn after those that were asked for before it.
    fn list_some(&mut self) {
        let Some(mut listing) = self.questions.listings.pop_front() else { return };
        let Listing { list, most, from, .. } = &mut listing;
        let next = self.mirror.mapped_some(SpaceId::DEVICE, *from, ENTRIES_A_TURN, |range| {
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
                self.questions.listings.push_back(listing);
            }
            None => drop(listing.answer.send(listing.list)),
        }
    }

    fn begin_audit(&mut self, now: Duration) {
        if self.questions.audit.is_some() {
            return;
        }
        self.questions.audit = Some(Audit::begin(now));
        let mut news = self.sink.instruments().query_channel.audit();
        (news.running, news.report) = (true, Some(AuditReport::default()));
    }

    /// Asks for a few pages again, and sees whether the audit is at its end.
    fn audit_some(&mut self, now: Duration) {
        let possible = self.running && self.has_iommu() && self.channel.is_some();
        if !possible {
            return self.interrupt_audit(now);
        }
        let Some(audit) = &mut self.questions.audit else { return };
        if let Some(from) = audit.wants(now) {
            let mut ranges = Vec::new();
            let next =
                self.mirror.mapped_some(SpaceId::DEVICE, from, ENTRIES_A_TURN, |range| ranges.push(range));
            audit.listed(ranges, next);
        }
        for (number, page) in audit.questions(now) {
            let waiter = Waiter::Audit(number);
            if self.misses.request(now, page.space, page.iova, page.access, waiter) == Requested::Full {
                audit.not_asked(number);
            }
        }
        match audit.finished(now) {
            Some(report) => {
                self.questions.audit = None;
                self.audit_ended(report);
            }
            None => self.sink.instruments().query_channel.audit().report = Some(audit.report().clone()),
        }
    }

    /// The answer to a question of the audit.
    pub(super) fn audit_answered(&mut self, now: Duration, number: u32, outcome: &Outcome) {
        if let Some(audit) = &mut self.questions.audit {
            audit.answered(now, number, outcome);
        }
    }

    /// The device stops, or the session ends: an audit cannot go on.
    pub(super) fn interrupt_audit(&mut self, now: Duration) {
        if let Some(audit) = self.questions.audit.take() {
            self.audit_ended(audit.interrupt(now));
        }
    }

    fn audit_ended(&self, report: AuditReport) {
        let instruments = self.sink.instruments();
        let result = audit_json(&report);
        {
            let mut news = instruments.query_channel.audit();
            (news.running, news.report) = (false, Some(report));
        }
        // Whoever hears of it finds it.
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
                .mirror
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
            state.answer_questions(Duration::ZERO);
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
