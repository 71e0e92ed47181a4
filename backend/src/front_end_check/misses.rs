//! MISSes and their answers: each MISS is answered once, in order, by an UPDATE that covers the page and a reply of
//! success, or by a reply of failure. Knows nothing of sockets, of the mirror, or of memory.
//!
//! The UPDATE and the reply use two sockets, so a reply may be read before an UPDATE that was sent earlier, if the
//! front-end did not wait for the ack. A success without its UPDATE is therefore *unsettled* until the main socket was
//! seen empty after it. The device repeats the MISS meanwhile; the overtaken UPDATE was sent before the repeated MISS,
//! and answers the first one only.

use std::collections::VecDeque;
use std::time::Duration;

use device_model::addr::{Access, ByteRange, Iova};
use device_model::mmu::miss::MissRequest;

use super::book::Book;
use super::rules::Rule;
use crate::vhost_user::iotlb::Update;

/// A late MISS counts as unanswered after this many further miss timeouts.
const PATIENCE: u32 = 9;

/// A MISS that was sent and not judged yet.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// Number of MISSes sent before it.
    number: u64,
    page: ByteRange<Iova>,
    access: Access,
    sent: Duration,
    /// An UPDATE has come that covers the page and allows the access.
    updated: bool,
    /// An INVALIDATE of the page has come since, or an UPDATE that is itself a finding: no UPDATE is required.
    excused: bool,
    /// An UPDATE has come that concerns this MISS but does not satisfy it.
    short: Option<Update>,
    /// When the miss timeout expired.
    late: Option<Duration>,
    /// It was already reported as unanswered.
    told: bool,
}

impl Asked {
    fn is_covered_by(&self, update: &Update) -> bool {
        update.range.whole_pages().is_some_and(|pages| pages.covers(self.page))
    }

    fn is_allowed_by(&self, update: &Update) -> bool {
        match self.access {
            Access::Read => update.read,
            Access::Write => update.write,
        }
    }
}

/// MISSes that are not answered, or whose answer cannot be judged yet.
#[derive(Debug)]
pub(super) struct Misses {
    timeout: Duration,
    asked: VecDeque<Asked>,
    /// Successes whose UPDATE has not been read, each with the number of the first MISS that was sent after the reply
    /// was read.
    unsettled: Vec<(Asked, u64)>,
    /// The number of the next MISS.
    next: u64,
    /// The answers are out of order: they cannot be matched to MISSes until all MISSes are answered.
    lost: bool,
}

impl Misses {
    pub(super) fn new(timeout: Duration) -> Self {
        Self { timeout, asked: VecDeque::new(), unsettled: Vec::new(), next: 0, lost: false }
    }

    /// A MISS was sent.
    pub(super) fn sent(&mut self, now: Duration, request: MissRequest) {
        let page = request.iova.page_range();
        self.lost &= !self.asked.is_empty();
        let access = request.access;
        let asked = Asked {
            number: self.next,
            page,
            access,
            sent: now,
            updated: false,
            excused: false,
            short: None,
            late: None,
            told: false,
        };
        self.next += 1;
        self.asked.push_back(asked);
    }

    /// A valid UPDATE has come.
    pub(super) fn updated(&mut self, update: &Update, book: &mut Book) {
        let answers = |asked: &Asked| asked.is_covered_by(update) && asked.is_allowed_by(update);
        let overtaken = self.unsettled.iter().filter(|(asked, _)| answers(asked));
        // An overtaken UPDATE was sent before every MISS that followed its reply.
        let before = overtaken.map(|(_, next)| *next).min();
        self.unsettled.retain(|(asked, _)| !answers(asked));
        let mut wanted = before.is_some();
        let before = before.unwrap_or(self.next);
        for asked in self.asked.iter_mut().filter(|asked| asked.number < before && answers(asked)) {
            asked.updated = true;
            wanted = true;
        }
        if !wanted {
            return self.updated_otherwise(update, book);
        }
        let claims_more = |asked: &Asked| match asked.access {
            Access::Read => update.write,
            Access::Write => update.read,
        };
        if let Some(asked) = self.asked.iter().find(|asked| asked.is_covered_by(update) && claims_more(asked))
        {
            let seen = format!("the MISS was for {}, and the UPDATE allows read and write", asked.access);
            let (page, access) = (asked.page, asked.access);
            let found = book.find(Rule::UpdateClaimsMore, page.first().raw(), seen);
            about(found, page, access);
        }
    }

    /// An UPDATE has come that satisfies no MISS. It counts for the first that it overlaps and that has no UPDATE (a MISS that
    /// was answered wrongly is sent again, perhaps before its answer is judged), or else for the first without one.
    fn updated_otherwise(&mut self, update: &Update, book: &mut Book) {
        let outstanding = || self.unsettled.iter().map(|(asked, _)| asked).chain(&self.asked);
        let overlaps = |asked: &Asked| asked.page.overlaps(update.range);
        let touched = outstanding()
            .position(|asked| overlaps(asked) && asked.short.is_none())
            .or_else(|| outstanding().position(overlaps));
        let first =
            || outstanding().position(|asked| asked.short.is_none() && !asked.updated && !asked.excused);
        let index = touched.or_else(first);
        let mut all = self.unsettled.iter_mut().map(|(asked, _)| asked).chain(&mut self.asked);
        match index.and_then(|index| all.nth(index)) {
            Some(asked) => asked.short = Some(*update),
            None => {
                let seen =
                    format!("the UPDATE was of {}, and no MISS was waiting for an answer", update.range);
                if let Some(found) = book.find(Rule::UpdateUnasked, 0, seen) {
                    found.range = Some(update.range);
                }
            }
        }
    }

    /// An invalid UPDATE has come, which is a separate finding.
    pub(super) fn update_rejected(&mut self) {
        let first = self.unsettled.first_mut().map(|(asked, _)| asked).or(self.asked.front_mut());
        if let Some(asked) = first {
            asked.excused = true;
        }
    }

    /// An INVALIDATE has come: answers for its range are void, and the device will send these MISSes again.
    pub(super) fn invalidated(&mut self, range: ByteRange<Iova>) {
        let is_hit = |asked: &Asked| {
            let short = asked.short.is_some_and(|update| update.range.page_aligned().overlaps(range));
            short || asked.page.overlaps(range)
        };
        self.unsettled.retain(|(asked, _)| !is_hit(asked));
        self.asked.iter_mut().filter(|asked| is_hit(asked)).for_each(|asked| asked.excused = true);
    }

    /// A reply has come on the back-end channel.
    pub(super) fn answered(&mut self, granted: bool, book: &mut Book) {
        let Some(head) = self.asked.pop_front() else { return };
        if self.lost || !granted || head.updated || head.excused {
            return;
        }
        let Some(later) = self.asked.iter().find(|asked| asked.updated && head.short.is_none()) else {
            return self.unsettled.push((head, self.next));
        };
        let seen = format!(
            "success came for the MISS of {} for {}, when the UPDATE for that of {} for {} had come and its own had not",
            head.page, head.access, later.page, later.access
        );
        let found = book.find(Rule::AnswerOutOfOrder, 0, seen);
        about(found, head.page, head.access);
        self.lost = true;
    }

    /// Whether [`Self::settle`] has work to do.
    pub(super) fn has_unsettled(&self) -> bool {
        !self.unsettled.is_empty()
    }

    /// The main socket is empty: an UPDATE that has not arrived for an answer was never sent.
    pub(super) fn settle(&mut self, book: &mut Book) {
        for (asked, _) in std::mem::take(&mut self.unsettled) {
            let waited = book.now().saturating_sub(asked.sent);
            let (rule, what) = match &asked.short {
                None => (Rule::MissWithoutUpdate, "no UPDATE".to_owned()),
                Some(update) if asked.is_covered_by(update) => {
                    (Rule::UpdateLacksPermission, format!("an UPDATE that does not allow {}", asked.access))
                }
                Some(update) => (Rule::UpdateDoesNotCover, format!("an UPDATE of {}", update.range)),
            };
            let seen =
                format!("success came {waited:?} after the MISS for {}, with {what} before it", asked.access);
            let found = book.find(rule, asked.page.first().raw(), seen);
            about(found, asked.page, asked.access);
        }
    }

    /// The miss timeout of this MISS has expired.
    pub(super) fn gave_up(&mut self, request: MissRequest, book: &mut Book) {
        let (now, timeout) = (book.now(), self.timeout);
        let same = |asked: &&mut Asked| {
            asked.page.first() == request.iova && asked.access == request.access && asked.late.is_none()
        };
        // While answers are out of order, it is unknown which MISS this one belonged to.
        let Some(asked) = self.asked.iter_mut().find(same).filter(|_| !self.lost) else { return };
        asked.late = Some(now);
        let waited = now.saturating_sub(asked.sent);
        let seen = format!("no answer within {timeout:?}; {waited:?} have passed since it was sent");
        let found = book.find(Rule::MissLate, 0, seen);
        about(found, asked.page, asked.access);
    }

    fn given_up(&self, asked: &Asked) -> Option<Duration> {
        let late = asked.late.filter(|_| !asked.told && !self.lost)?;
        Some(late.saturating_add(self.timeout.saturating_mul(PATIENCE)))
    }

    /// When [`Self::expire`] has to be called next.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.asked.iter().filter_map(|asked| self.given_up(asked)).min()
    }

    /// Reports the MISSes that count as unanswered by now.
    pub(super) fn expire(&mut self, book: &mut Book) {
        let now = book.now();
        let due: Vec<_> =
            self.asked.iter().map(|asked| self.given_up(asked).is_some_and(|due| due <= now)).collect();
        self.find_unanswered(&due, book);
    }

    /// The connection has ended: MISSes that are late by now count as unanswered.
    pub(super) fn end(&mut self, book: &mut Book) {
        self.settle(book);
        let (now, timeout) = (book.now(), self.timeout);
        let is_due = |asked: &Asked| {
            let late = asked.late.filter(|_| !asked.told && !self.lost);
            late.is_some_and(|late| late.saturating_add(timeout) <= now)
        };
        let due: Vec<_> = self.asked.iter().map(is_due).collect();
        self.find_unanswered(&due, book);
    }

    fn find_unanswered(&mut self, due: &[bool], book: &mut Book) {
        let now = book.now();
        for (asked, _) in self.asked.iter_mut().zip(due).filter(|(_, due)| **due) {
            asked.told = true;
            let waited = now.saturating_sub(asked.sent);
            let seen = format!("no answer came in {waited:?} since the MISS was sent");
            let found = book.find(Rule::MissUnanswered, asked.page.first().raw(), seen);
            about(found, asked.page, asked.access);
        }
    }

    /// The channel was replaced: MISSes sent on the old one are not answered.
    pub(super) fn channel_replaced(&mut self) {
        self.asked.clear();
        self.unsettled.clear();
        self.lost = false;
    }
}

fn about(found: Option<&mut super::finding::Finding>, page: ByteRange<Iova>, access: Access) {
    if let Some(found) = found {
        (found.range, found.access) = (Some(page), Some(access));
    }
}

#[cfg(test)]
mod tests {
    use device_model::addr::{DomainId, FrontendVa};

    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(100);

    fn page(number: u64) -> Iova {
        Iova::new(number << 12)
    }

    fn update(first: u64, pages: u64, read: bool, write: bool) -> Update {
        let range = ByteRange::new(page(first), pages << 12).unwrap();
        let target = ByteRange::new(FrontendVa::new(0x7f00_0000_0000), pages << 12).unwrap();
        Update { range, target, read, write }
    }

    fn request(number: u64, access: Access) -> MissRequest {
        MissRequest { space: DomainId::DEVICE, access, iova: page(number) }
    }

    /// A checker to which MISSes for reads of these pages were sent.
    fn asked(pages: &[u64]) -> (Misses, Book) {
        let mut misses = Misses::new(TIMEOUT);
        pages.iter().for_each(|number| misses.sent(Duration::ZERO, request(*number, Access::Read)));
        (misses, Book::default())
    }

    fn rules(book: &mut Book) -> Vec<Rule> {
        book.take().iter().map(|finding| finding.rule).collect()
    }

    #[test]
    fn an_answer_with_its_update_is_right_in_any_order_of_updates() {
        let (mut misses, mut book) = asked(&[1, 2, 3, 4]);
        misses.updated(&update(2, 1, true, false), &mut book);
        misses.updated(&update(1, 1, true, false), &mut book);
        misses.updated(&update(3, 2, true, false), &mut book);
        (0..3).for_each(|_| misses.answered(true, &mut book));
        misses.answered(false, &mut book);
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), []);
    }

    #[test]
    fn a_repeated_miss_that_gets_the_same_wrong_update_is_told_as_the_first_one() {
        let (mut misses, mut book) = asked(&[1]);
        for repeated in [true, false] {
            misses.updated(&update(1, 1, false, true), &mut book);
            misses.answered(true, &mut book);
            if repeated {
                misses.sent(Duration::ZERO, request(1, Access::Read));
            }
        }
        misses.settle(&mut book);
        // One finding an address and rule, however often.
        assert_eq!(rules(&mut book), [Rule::UpdateLacksPermission]);
    }

    #[test]
    fn a_success_without_an_update_waits_for_an_empty_socket() {
        let (mut misses, mut book) = asked(&[1, 2]);
        misses.answered(true, &mut book);
        misses.answered(true, &mut book);
        assert!(misses.has_unsettled());
        // It had been sent before: the front-end did not wait for the ack.
        misses.updated(&update(1, 1, true, false), &mut book);
        misses.settle(&mut book);
        let found = book.take();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].rule, found[0].access), (Rule::MissWithoutUpdate, Some(Access::Read)));
        assert_eq!(found[0].range.unwrap().first(), page(2));
    }

    #[test]
    fn an_update_that_was_overtaken_by_its_reply_is_no_answer_to_the_question_that_came_after_that() {
        let (mut misses, mut book) = asked(&[1, 2]);
        misses.answered(true, &mut book);
        // The device has seen no UPDATE, and repeats the MISS. Then the first UPDATE comes, then the second.
        misses.sent(Duration::ZERO, request(1, Access::Read));
        misses.updated(&update(1, 1, true, false), &mut book);
        misses.answered(true, &mut book);
        misses.updated(&update(2, 1, true, false), &mut book);
        misses.updated(&update(1, 1, true, false), &mut book);
        misses.answered(true, &mut book);
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), []);
        // Nor does it count as the UPDATE of an answer that has none.
        misses.sent(Duration::ZERO, request(3, Access::Read));
        misses.answered(true, &mut book);
        misses.sent(Duration::ZERO, request(3, Access::Read));
        misses.updated(&update(3, 1, true, false), &mut book);
        misses.answered(true, &mut book);
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), [Rule::MissWithoutUpdate]);
    }

    #[test]
    fn an_update_beside_the_page_or_without_its_permission_is_found() {
        let (mut misses, mut book) = asked(&[5]);
        misses.updated(&update(1, 1, true, true), &mut book);
        misses.answered(true, &mut book);
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), [Rule::UpdateDoesNotCover]);
        misses.sent(Duration::ZERO, request(5, Access::Write));
        misses.updated(&update(5, 1, true, false), &mut book);
        misses.answered(true, &mut book);
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), [Rule::UpdateLacksPermission]);
    }

    #[test]
    fn each_wrong_update_belongs_to_an_answer_of_its_own() {
        let (mut misses, mut book) = asked(&[5, 6, 7]);
        for _ in 0..3 {
            misses.updated(&update(1, 1, true, true), &mut book);
            misses.answered(true, &mut book);
        }
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), [Rule::UpdateDoesNotCover; 3]);
    }

    #[test]
    fn part_of_a_page_does_not_cover_it() {
        let (mut misses, mut book) = asked(&[5]);
        let half = Update { range: ByteRange::new(page(5), 0x800).unwrap(), ..update(5, 1, true, true) };
        misses.updated(&half, &mut book);
        misses.answered(true, &mut book);
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), [Rule::UpdateDoesNotCover]);
    }

    #[test]
    fn an_invalidation_between_update_and_reply_excuses_the_answer() {
        for before in [true, false] {
            let (mut misses, mut book) = asked(&[5]);
            if before {
                misses.updated(&update(4, 1, true, true), &mut book);
            }
            misses.invalidated(ByteRange::new(page(4), 2 << 12).unwrap());
            misses.answered(true, &mut book);
            misses.settle(&mut book);
            assert_eq!(rules(&mut book), []);
        }
    }

    #[test]
    fn what_qemu_claims_and_sends_unasked_is_a_note() {
        let (mut misses, mut book) = asked(&[]);
        misses.updated(&update(9, 1, true, true), &mut book);
        misses.sent(Duration::ZERO, request(1, Access::Read));
        misses.updated(&update(1, 1, true, true), &mut book);
        misses.answered(true, &mut book);
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), [Rule::UpdateUnasked, Rule::UpdateClaimsMore]);
    }

    #[test]
    fn a_miss_that_is_left_out_is_found_once_and_what_follows_is_not_judged() {
        let (mut misses, mut book) = asked(&[1, 2, 3]);
        for number in [2, 3] {
            misses.updated(&update(number, 1, true, false), &mut book);
            misses.answered(true, &mut book);
        }
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), [Rule::AnswerOutOfOrder]);
        misses.answered(true, &mut book);
        misses.sent(Duration::ZERO, request(4, Access::Read));
        misses.answered(true, &mut book);
        misses.settle(&mut book);
        assert_eq!(rules(&mut book), [Rule::MissWithoutUpdate]);
    }

    #[test]
    fn a_late_answer_is_a_note_and_one_that_never_comes_a_finding() {
        let (mut misses, mut book) = asked(&[1, 2]);
        book.turn_to(TIMEOUT);
        misses.gave_up(request(1, Access::Read), &mut book);
        misses.gave_up(request(2, Access::Read), &mut book);
        assert_eq!(rules(&mut book), [Rule::MissLate]);
        misses.updated(&update(1, 1, true, false), &mut book);
        misses.answered(true, &mut book);
        assert_eq!(misses.deadline(), Some(TIMEOUT * 10));
        book.turn_to(TIMEOUT * 10);
        misses.expire(&mut book);
        misses.expire(&mut book);
        misses.end(&mut book);
        assert_eq!(rules(&mut book), [Rule::MissUnanswered]);
        assert_eq!(misses.deadline(), None);
    }

    #[test]
    fn a_front_end_that_goes_away_late_is_found_and_one_that_goes_at_once_is_not() {
        for (end, expected) in [(TIMEOUT, &[][..]), (TIMEOUT * 2, &[Rule::MissUnanswered][..])] {
            let (mut misses, mut book) = asked(&[1]);
            book.turn_to(TIMEOUT);
            misses.gave_up(request(1, Access::Read), &mut book);
            book.take();
            book.turn_to(end);
            misses.end(&mut book);
            assert_eq!(rules(&mut book), expected, "{end:?}");
        }
    }
}
