//! The negotiated features and the state of each ring: memory table, size, addresses, kick, enable, stop. Finds
//! messages that come without their feature or at the wrong time. Knows nothing of a ring's content, and nothing of the
//! IOTLB.

use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures as Virtio};

use device_model::session::{Offer, QUEUES};

use super::book::Book;
use super::messages::{Message, Needs, code, u32_at, u64_at};
use super::rules::Rule;
use crate::vhost_user::Header;

/// The state of one ring according to the messages so far.
#[derive(Clone, Copy, Debug, Default)]
struct RingOrder {
    sized: bool,
    placed: bool,
    kicked: bool,
    enabled: bool,
}

impl RingOrder {
    fn runs(self) -> bool {
        self.kicked && self.enabled
    }
}

/// The negotiated features, and the state of the rings.
#[derive(Debug)]
pub(super) struct Order {
    offer: Offer,
    features: u64,
    protocol: u64,
    has_owner: bool,
    has_memory: bool,
    rings: [RingOrder; QUEUES],
}

impl Order {
    pub(super) fn new(offer: Offer) -> Self {
        let (features, protocol, rings) = (0, 0, [RingOrder::default(); QUEUES]);
        Self { offer, features, protocol, has_owner: false, has_memory: false, rings }
    }

    /// Whether ring addresses are IOVAs.
    pub(super) fn has_iommu(&self) -> bool {
        self.features & 1 << virtio_bindings::virtio_config::VIRTIO_F_IOMMU_PLATFORM != 0
    }

    /// The first ring that is running, if any.
    pub(super) fn running(&self) -> Option<usize> {
        self.rings.iter().position(|ring| ring.runs())
    }

    /// Judges a message by header, size and time; `payload` is the part of it that could be read without consuming it.
    pub(super) fn message(&mut self, header: Header, payload: &[u8], book: &mut Book) {
        let number = header.code();
        let thing = u64::from(number);
        let reply_ack = Protocol::REPLY_ACK.bits();
        if header.needs_reply() && self.protocol & reply_ack == 0 {
            book.find(Rule::ReplyNotNegotiated, thing, "NEED_REPLY is set in the flags".to_owned());
        }
        let Some(message) = Message::of(number) else {
            book.find(Rule::MessageUnknown, thing, format!("message {number}"));
            return;
        };
        let missing = match message.needs {
            Needs::Nothing => None,
            Needs::Protocol(feature) => {
                let there = self.protocol & feature.bits() != 0;
                (!there).then(|| format!("protocol feature {:#x} is needed for it", feature.bits()))
            }
            Needs::Virtio(feature) => {
                let there = self.features & feature.bits() != 0;
                (!there).then(|| format!("feature {:#x} is needed for it", feature.bits()))
            }
        };
        if let Some(missing) = missing {
            book.find(Rule::MessageNotNegotiated, thing, missing);
            return;
        }
        if let Some(seen) = message.wrong_size(header.payload_len(), payload) {
            book.find(Rule::MessageSize, thing, seen);
            return;
        }
        self.content(number, payload, book);
    }

    fn content(&mut self, number: u32, payload: &[u8], book: &mut Book) {
        match number {
            code::SET_FEATURES => self.set_features(payload, book),
            code::SET_PROTOCOL_FEATURES => self.set_protocol_features(payload, book),
            code::SET_OWNER => self.has_owner = true,
            code::SET_MEM_TABLE | code::ADD_MEM_REG => self.has_memory = true,
            code::RESET_OWNER => {
                book.find(Rule::OwnerReset, 0, "RESET_OWNER".to_owned());
                self.reset();
            }
            code::RESET_DEVICE => {
                if let Some(ring) = self.running() {
                    let seen = format!("ring {ring} is started and enabled");
                    book.find(Rule::ResetWhileRunning, 0, seen);
                }
                self.reset();
            }
            code::SET_VRING_NUM
            | code::SET_VRING_ADDR
            | code::SET_VRING_BASE
            | code::GET_VRING_BASE
            | code::SET_VRING_ENABLE => self.ring_message(number, u32_at(payload, 0), payload, book),
            code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR => {
                // vhost-user.rst, VHOST_USER_SET_VRING_KICK: bits 0 to 7 are the ring's index.
                self.ring_message(number, u32_at(payload, 0).map(|word| word & 0xff), payload, book);
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        for ring in &mut self.rings {
            (ring.kicked, ring.enabled) = (false, false);
        }
    }

    fn set_features(&mut self, payload: &[u8], book: &mut Book) {
        let Some(features) = u64_at(payload, 0) else { return };
        let unknown = features & !self.offer.virtio;
        let (passed_on, wrong) = (unknown & self.offer.passed_on, unknown & !self.offer.passed_on);
        if passed_on != 0 {
            book.find(Rule::FeaturePassedOn, 0, format!("features {passed_on:#x} were not offered"));
        }
        if wrong != 0 {
            book.find(Rule::FeatureNotOffered, wrong, format!("features {wrong:#x} were not offered"));
        }
        if let Some(ring) = self.running().filter(|_| features != self.features) {
            let old = self.features;
            let seen = format!("features {features:#x} instead of {old:#x}, while ring {ring} ran");
            book.find(Rule::FeaturesChangedWhileRunning, features, seen);
        }
        self.features = features;
        if features & Virtio::PROTOCOL_FEATURES.bits() == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
    }

    fn set_protocol_features(&mut self, payload: &[u8], book: &mut Book) {
        let Some(features) = u64_at(payload, 0) else { return };
        let unknown = features & !self.offer.protocol;
        if unknown != 0 {
            let seen = format!("protocol features {unknown:#x} were not offered");
            book.find(Rule::ProtocolFeatureNotOffered, unknown, seen);
        }
        self.protocol = features;
    }

    fn ring_message(&mut self, number: u32, index: Option<u32>, payload: &[u8], book: &mut Book) {
        let Some(index) = index else { return };
        let name = Message::name_of(number);
        let thing = u64::from(number) << 32 | u64::from(index);
        let ring = usize::try_from(index).ok().and_then(|index| self.rings.get_mut(index));
        let Some(ring) = ring else {
            let seen = format!("{name} of ring {index}, and there are rings 0 to {}", QUEUES - 1);
            book.find(Rule::RingNotThere, thing, seen);
            return;
        };
        let ran = ring.runs();
        let while_running = || format!("{name} of ring {index}, which is started and enabled");
        match number {
            code::SET_VRING_NUM | code::SET_VRING_BASE if ran => {
                book.find(Rule::RingChangedWhileRunning, thing, while_running());
            }
            code::SET_VRING_ADDR | code::SET_VRING_KICK if ran => {
                book.find(Rule::RingMovedWhileRunning, thing, while_running());
            }
            code::SET_VRING_NUM => ring.sized = true,
            code::SET_VRING_ADDR => ring.placed = true,
            code::SET_VRING_KICK => ring.kicked = true,
            code::SET_VRING_ENABLE => ring.enabled = u32_at(payload, 4) == Some(1),
            code::GET_VRING_BASE if ring.kicked => ring.kicked = false,
            code::GET_VRING_BASE => {
                book.find(Rule::StopOfStoppedRing, 0, format!("ring {index} has no kick descriptor"));
            }
            _ => {}
        }
        let now = *ring;
        if now.runs() && !ran {
            self.started(index, now, book);
        }
    }

    /// The ring starts to run.
    fn started(&self, index: u32, ring: RingOrder, book: &mut Book) {
        let lacks = [(ring.sized, "size"), (ring.placed, "addresses"), (self.has_memory, "memory table")];
        let lacks: Vec<_> = lacks.iter().filter(|(there, _)| !there).map(|(_, what)| *what).collect();
        if !lacks.is_empty() {
            let seen = format!("ring {index} was started without {}", lacks.join(", "));
            book.find(Rule::RingNotSetUp, index.into(), seen);
        }
        if !self.has_owner {
            book.find(Rule::OwnerNotSet, 0, format!("ring {index} was started, and SET_OWNER did not come"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLY_ACK: u64 = 1 << 3;
    const RESET_DEVICE: u64 = 1 << 13;
    const PROTOCOL_FEATURES: u64 = 1 << 30;
    const OFFER: Offer =
        Offer { virtio: PROTOCOL_FEATURES | 1, passed_on: 2, protocol: REPLY_ACK | RESET_DEVICE };

    struct Talk {
        order: Order,
        book: Book,
    }

    impl Talk {
        fn new() -> Self {
            Self { order: Order::new(OFFER), book: Book::default() }
        }

        /// The state when QEMU is about to start the device.
        fn negotiated() -> Self {
            let mut talk = Self::new();
            talk.long(code::SET_PROTOCOL_FEATURES, REPLY_ACK | RESET_DEVICE);
            talk.send(code::SET_OWNER, &[]);
            talk.long(code::SET_FEATURES, PROTOCOL_FEATURES | 1);
            talk.send(code::SET_MEM_TABLE, &[0; 8]);
            talk
        }

        fn started() -> Self {
            let mut talk = Self::negotiated();
            for ring in 0..2 {
                talk.ring(code::SET_VRING_NUM, ring, 64);
                talk.ring(code::SET_VRING_BASE, ring, 0);
                talk.addresses(ring);
                talk.ring(code::SET_VRING_KICK, ring, 0);
                talk.ring(code::SET_VRING_ENABLE, ring, 1);
            }
            talk
        }

        fn send(&mut self, number: u32, payload: &[u8]) {
            self.send_with(number, payload, false);
        }

        fn send_with(&mut self, number: u32, payload: &[u8], need_reply: bool) {
            let header = Header::request(number, payload.len() as u32, need_reply);
            self.order.message(header, payload, &mut self.book);
        }

        fn long(&mut self, number: u32, value: u64) {
            self.send(number, &value.to_ne_bytes());
        }

        fn ring(&mut self, number: u32, ring: u32, value: u32) {
            self.send(number, &[ring.to_ne_bytes(), value.to_ne_bytes()].concat());
        }

        fn addresses(&mut self, ring: u32) {
            let mut payload = [0; 40];
            payload[..4].copy_from_slice(&ring.to_ne_bytes());
            self.send(code::SET_VRING_ADDR, &payload);
        }

        fn rules(&mut self) -> Vec<Rule> {
            self.book.take().iter().map(|finding| finding.rule).collect()
        }
    }

    #[test]
    fn qemus_order_of_start_stop_and_reset_is_right() {
        let mut talk = Talk::started();
        for ring in 0..2 {
            talk.ring(code::SET_VRING_ENABLE, ring, 0);
        }
        for ring in 0..2 {
            talk.ring(code::GET_VRING_BASE, ring, 0);
        }
        talk.send(code::RESET_DEVICE, &[]);
        for ring in 0..2 {
            talk.ring(code::SET_VRING_NUM, ring, 64);
            talk.ring(code::SET_VRING_BASE, ring, 0);
            talk.addresses(ring);
            talk.ring(code::SET_VRING_KICK, ring, 0);
        }
        for ring in 0..2 {
            talk.ring(code::SET_VRING_CALL, ring, 0);
            talk.ring(code::SET_VRING_ENABLE, ring, 1);
        }
        assert_eq!(talk.rules(), []);
        assert_eq!(talk.order.running(), Some(0));
    }

    /// A front-end may leave its rings enabled during a stop.
    #[test]
    fn get_vring_base_alone_is_a_stop() {
        let mut talk = Talk::started();
        (0..2).for_each(|ring| talk.ring(code::GET_VRING_BASE, ring, 0));
        assert_eq!(talk.order.running(), None);
        (0..2).for_each(|ring| talk.ring(code::SET_VRING_NUM, ring, 128));
        assert_eq!(talk.rules(), []);
    }

    #[test]
    fn a_ring_that_runs_is_left_alone() {
        for (number, rule) in [
            (code::SET_VRING_NUM, Rule::RingChangedWhileRunning),
            (code::SET_VRING_BASE, Rule::RingChangedWhileRunning),
            (code::SET_VRING_KICK, Rule::RingMovedWhileRunning),
        ] {
            let mut talk = Talk::started();
            talk.ring(number, 1, 0);
            assert_eq!(talk.rules(), [rule]);
        }
        let mut talk = Talk::started();
        talk.addresses(0);
        talk.long(code::SET_FEATURES, PROTOCOL_FEATURES);
        assert_eq!(talk.rules(), [Rule::RingMovedWhileRunning, Rule::FeaturesChangedWhileRunning]);
    }

    #[test]
    fn a_ring_that_is_not_enabled_may_be_set_up_in_any_order() {
        let mut talk = Talk::negotiated();
        talk.ring(code::SET_VRING_KICK, 0, 0);
        talk.addresses(0);
        talk.ring(code::SET_VRING_NUM, 0, 64);
        talk.ring(code::SET_VRING_ENABLE, 0, 1);
        // QEMU enables all rings, including those that the driver does not use.
        talk.ring(code::SET_VRING_ENABLE, 1, 1);
        assert_eq!(talk.rules(), []);
    }

    #[test]
    fn a_ring_that_starts_without_what_it_needs_is_found() {
        let mut talk = Talk::new();
        talk.long(code::SET_FEATURES, PROTOCOL_FEATURES);
        talk.ring(code::SET_VRING_KICK, 0, 0);
        talk.ring(code::SET_VRING_ENABLE, 0, 1);
        let found = talk.book.take();
        assert_eq!(found[0].rule, Rule::RingNotSetUp);
        assert_eq!(found[0].seen, "ring 0 was started without size, addresses, memory table");
        assert_eq!(found[1].rule, Rule::OwnerNotSet);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn what_was_not_negotiated_or_not_offered_is_found() {
        let mut talk = Talk::new();
        talk.send_with(code::SET_OWNER, &[], true);
        talk.send(code::RESET_DEVICE, &[]);
        talk.ring(code::SET_VRING_ENABLE, 0, 1);
        talk.send(39, &[0; 8]);
        talk.long(code::SET_PROTOCOL_FEATURES, 1);
        talk.long(code::SET_FEATURES, 2 | 4);
        talk.send(45, &[]);
        let expected = [
            Rule::ReplyNotNegotiated,
            Rule::MessageNotNegotiated,
            Rule::MessageNotNegotiated,
            Rule::MessageNotNegotiated,
            Rule::ProtocolFeatureNotOffered,
            Rule::FeaturePassedOn,
            Rule::FeatureNotOffered,
            Rule::MessageUnknown,
        ];
        assert_eq!(talk.rules(), expected);
    }

    #[test]
    fn odd_stops_are_notes() {
        let mut talk = Talk::started();
        talk.send(code::RESET_DEVICE, &[]);
        talk.ring(code::GET_VRING_BASE, 0, 0);
        talk.send(code::RESET_OWNER, &[]);
        let expected = [Rule::ResetWhileRunning, Rule::StopOfStoppedRing, Rule::OwnerReset];
        assert_eq!(talk.rules(), expected);
        assert_eq!(talk.order.running(), None);
    }

    #[test]
    fn a_ring_that_is_not_there_and_a_size_that_does_not_fit_are_found() {
        let mut talk = Talk::started();
        talk.ring(code::GET_VRING_BASE, 2, 0);
        talk.send(code::SET_VRING_NUM, &[0; 7]);
        assert_eq!(talk.rules(), [Rule::RingNotThere, Rule::MessageSize]);
    }
}
