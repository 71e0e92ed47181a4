//! Tests of the front-end checker with whole conversations between a front-end and the session.

use std::fs::File;
use std::sync::Arc;

use device_model::addr::{Access, DomainId};
use device_model::mmu::{DrainWaker, HostRange, MirrorConfig, Permissions, mirror};
use device_model::session::Refusal;
use virtio_bindings::virtio_config::VIRTIO_F_IOMMU_PLATFORM;

use super::*;
use crate::threads::ThreadFailure;
use crate::vhost_user::memory::RegionSpec;

const IOMMU: u64 = 1 << VIRTIO_F_IOMMU_PLATFORM;
const REPLY_ACK: u64 = 1 << 3;
const TIMEOUT: Duration = Duration::from_secs(1);
const USER: u64 = 0x7f00_0000_0000;
const SIZE: u64 = 0x10_0000;

struct Nobody;

impl DrainWaker for Nobody {
    fn wake(&self) {}
}

/// A front-end that has negotiated an IOMMU and sent a table of one region.
struct Talk {
    front_end_check: FrontEndCheck,
    memory: MemoryTable,
    mirror: MirrorWriter,
    _file: File,
}

impl Talk {
    fn new(features: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        let spec = RegionSpec { gpa: 0, size: SIZE, user_address: USER, file_offset: 0 };
        let memory = MemoryTable::map(&[spec], std::slice::from_ref(&file)).unwrap();
        let (mirror, _) = mirror(MirrorConfig { readers: 1, table_limit: 1 << 20 }, Arc::new(Nobody));
        let offer = Offer { virtio: IOMMU, passed_on: 0, protocol: REPLY_ACK | 1 << 15 };
        let mut this =
            Self { front_end_check: FrontEndCheck::new(offer, TIMEOUT), memory, mirror, _file: file };
        this.send(code::SET_PROTOCOL_FEATURES, false, &offer.protocol.to_ne_bytes());
        this.send(code::SET_FEATURES, true, &features.to_ne_bytes());
        this
    }

    fn send(&mut self, number: u32, need_reply: bool, payload: &[u8]) {
        let header = Header::request(number, payload.len() as u32, need_reply);
        let world = World { memory: &self.memory, mirror: &self.mirror };
        self.front_end_check.message(Duration::ZERO, header, payload, world);
    }

    fn iotlb(&mut self, kind: u8, iova: u64, size: u64, user: u64, permission: u8) {
        let mut payload: Vec<u8> = [iova, size, user].iter().flat_map(|word| word.to_ne_bytes()).collect();
        payload.extend([permission, kind, 0, 0, 0, 0, 0, 0]);
        self.send(code::IOTLB_MSG, true, &payload);
    }

    fn rules(&mut self) -> Vec<Rule> {
        self.front_end_check.take().iter().map(|finding| finding.rule).collect()
    }
}

fn miss(page: u64) -> MissRequest {
    MissRequest { space: DomainId::DEVICE, access: Access::Write, iova: Iova::new(page << 12) }
}

#[test]
fn an_update_is_held_to_the_memory_table_and_to_its_own_fields() {
    let mut talk = Talk::new(IOMMU);
    for (kind, size, user, permission, rule) in [
        (2, 0x1000, USER + SIZE - 0x800, 3, Rule::UpdateOutsideMemory),
        (2, 0, USER, 3, Rule::UpdateWithoutRange),
        (2, 0x1000, USER, 0, Rule::UpdateBadPermission),
        (2, 0x1000, USER, 8, Rule::UpdateBadPermission),
        (1, 0x1000, USER, 3, Rule::IotlbBadType),
    ] {
        let mut fresh = Talk::new(IOMMU);
        fresh.front_end_check.miss_sent(Duration::ZERO, miss(1));
        fresh.iotlb(kind, 0x1000, size, user, permission);
        // The UPDATE is at fault, not the answer that follows it.
        fresh.front_end_check.miss_answered(Duration::ZERO, true);
        fresh.front_end_check.main_socket_empty(Duration::ZERO);
        assert_eq!(fresh.rules(), [rule], "{kind} {size:#x} {user:#x} {permission}");
    }
    talk.front_end_check.miss_sent(Duration::ZERO, miss(1));
    talk.iotlb(2, 0x1000, 0x1000, USER, 2);
    talk.front_end_check.miss_answered(Duration::ZERO, true);
    assert!(!talk.front_end_check.wants_empty_socket());
    assert_eq!(talk.rules(), []);
}

#[test]
fn iotlb_messages_need_an_iommu() {
    let mut talk = Talk::new(0);
    talk.iotlb(3, 0, 0x1000, 0, 0);
    assert_eq!(talk.rules(), [Rule::IotlbNotNegotiated]);
}

#[test]
fn an_invalidate_that_nobody_awaits_is_found_and_named() {
    let mut talk = Talk::new(IOMMU);
    let mut payload = [0; 32];
    (payload[9], payload[25]) = (0x10, 3);
    talk.send(code::IOTLB_MSG, false, &payload);
    let found = talk.front_end_check.take();
    assert_eq!((found[0].rule, found[0].message), (Rule::InvalidateNotAwaited, Some("IOTLB_MSG")));
    assert_eq!(found[0].range, ByteRange::new(Iova::new(0), 0x1000).ok());
}

#[test]
fn a_region_that_goes_away_is_looked_for_in_what_the_device_holds() {
    for (held, is_found) in [(true, true), (false, false)] {
        let mut talk = Talk::new(IOMMU);
        if held {
            let range = ByteRange::new(Iova::new(0x5000), 0x1000).unwrap();
            // SAFETY: the region outlives the mirror, whose readers are gone.
            let host = unsafe { HostRange::new(talk.memory.regions()[0].host_at(0x3000), 0x1000) };
            talk.mirror.map(DomainId::DEVICE, range, host, Permissions::READ_WRITE).unwrap();
        }
        let payload: Vec<u8> = [0, 0, SIZE, USER, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        talk.send(code::REM_MEM_REG, true, &payload);
        let found = talk.front_end_check.take();
        assert_eq!(found.iter().any(|one| one.rule == Rule::RegionRemovedWhileMapped), is_found, "{found:?}");
        assert!(found.iter().all(|one| !one.rule.row().severity.accuses()), "{found:?}");
    }
}

#[test]
fn what_ends_a_session_is_judged_by_whose_fault_it_is() {
    let io = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
    let cases = [
        (SessionEnd::Closed, None),
        (SessionEnd::Signal, None),
        (SessionEnd::Revoked, None),
        (SessionEnd::Io(io()), None),
        (
            SessionEnd::ThreadFailed(Arc::new(ThreadFailure::Failed { name: String::new(), source: io() })),
            None,
        ),
        (SessionEnd::NoMessage(PeekError::Socket(io())), None),
        (SessionEnd::NoMessage(PeekError::NotARequest { code: 1 }), Some(Rule::MessageHeader)),
        (SessionEnd::Unfinished, Some(Rule::MessageCutOff)),
        (SessionEnd::Descriptors { code: 33, count: 2 }, Some(Rule::DescriptorsWrong)),
        (SessionEnd::MemoryLost, Some(Rule::MemoryTruncated)),
        (SessionEnd::Refused { code: 12, why: Refusal::other("no descriptor") }, Some(Rule::RequestRefused)),
    ];
    for (end, rule) in cases {
        let mut talk = Talk::new(IOMMU);
        talk.front_end_check.ended(Duration::ZERO, &end);
        assert_eq!(talk.rules(), rule.into_iter().collect::<Vec<_>>(), "{end:?}");
    }
}

#[test]
fn a_refusal_adds_nothing_to_a_finding_and_is_a_note_without_one() {
    let mut talk = Talk::new(IOMMU | 1);
    talk.front_end_check.refused(Duration::ZERO, "not offered");
    assert_eq!(talk.rules(), [Rule::FeatureNotOffered]);
    talk.send(code::SET_VRING_NUM, true, &[0, 0, 0, 0, 3, 0, 0, 0]);
    talk.front_end_check.refused(Duration::ZERO, "not a power of two");
    assert_eq!(talk.rules(), [Rule::RequestRefused]);
}

#[test]
fn a_channel_that_ends_is_no_fault_and_one_that_talks_nonsense_is() {
    let mut talk = Talk::new(IOMMU);
    talk.front_end_check.channel_failed(Duration::ZERO, &ChannelError::Closed);
    assert_eq!(talk.rules(), []);
    talk.front_end_check.channel_failed(Duration::ZERO, &ChannelError::Unasked);
    talk.front_end_check.channel_failed(Duration::ZERO, &ChannelError::NotAnAnswer(7));
    assert_eq!(talk.rules(), [Rule::AnswerUnasked, Rule::AnswerMalformed]);
}
