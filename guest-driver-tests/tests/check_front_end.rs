//! `--check-front-end`: a front-end that breaks a rule is found out, by the rule's name and nothing else's; one that keeps
//! them all is found clean, whatever its guest does. Each rule of backend/FRONT_END.md has a case here.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::control::Control;
use guest_driver_tests::soft_guest::memory::RamConfig;
use guest_driver_tests::soft_guest::wire::{
    IotlbMessage, NEED_REPLY, PERM_BOTH, PERM_READ, PERM_WRITE, REPLY, VERSION, request,
};
use guest_driver_tests::soft_guest::*;
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

const FLAG: &str = "--check-front-end";
const SECOND: Duration = Duration::from_secs(1);
const ASK: u32 = VERSION | NEED_REPLY;
const SIDE: u32 = 128;
const PAGES: u64 = 16;

/// Messages that are sent raw, by their numbers.
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GPU_SET_SOCKET: u32 = 33;
const RESET_DEVICE: u32 = 34;
const SET_STATUS: u32 = 39;
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// What stock QEMU does too, and so the soft guest in its likeness; and what a busy host does.
const USUAL: [&str; 5] =
    ["feature-passed-on", "update-claims-more", "update-unasked", "left-while-running", "miss-late"];

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A front-end that is being checked.
struct Trial {
    backend: Backend,
    control: Control,
}

impl Trial {
    fn start(args: &[&str]) -> Self {
        let backend = Backend::start(&[args, &[FLAG]].concat()).unwrap();
        let control = backend.control().unwrap();
        Self { backend, control }
    }

    /// A guest with a surface that the device does not know yet.
    fn boot(&self, config: GuestConfig) -> (SoftGuest, Surface) {
        let mut guest = SoftGuest::boot(&self.backend, config).unwrap();
        let surface = guest.surface(Format::B8G8R8X8, SIDE, SIDE).unwrap();
        (guest, surface)
    }

    fn findings(&mut self) -> Vec<Value> {
        let answer = self.control.execute("findings").unwrap();
        assert_eq!(answer["checking"], true);
        answer["findings"].as_array().unwrap().clone()
    }

    /// The finding against this rule, once there is one.
    fn found(&mut self, rule: &str) -> Value {
        let begin = Instant::now();
        loop {
            let findings = self.findings();
            if let Some(found) = findings.iter().find(|finding| finding["rule"] == rule) {
                return found.clone();
            }
            assert!(begin.elapsed() < 15 * SECOND, "no {rule}: {findings:#?}\n{}", self.backend.stderr());
            wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
        }
    }

    /// Waits until the back-end has judged that the front-end is gone.
    fn wait_for_the_end(&mut self) {
        let begin = Instant::now();
        while self.control.execute("jobs").is_ok() {
            assert!(begin.elapsed() < 15 * SECOND, "the session does not end: {}", self.backend.stderr());
            wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
        }
    }

    /// The front-end is gone: everything that was found goes by these rules, and the exit code says so.
    fn judge(mut self, rules: &[&str]) {
        rules.iter().for_each(|rule| drop(self.found(rule)));
        self.wait_for_the_end();
        let findings = self.findings();
        let of = |finding: &Value, field: &str| finding[field].as_str().unwrap().to_owned();
        let unexpected: Vec<_> = findings
            .iter()
            .filter(|finding| ![rules, &USUAL].concat().contains(&of(finding, "rule").as_str()))
            .collect();
        assert!(unexpected.is_empty(), "besides {rules:?}: {unexpected:#?}");
        let mut counts = BTreeMap::new();
        findings.iter().for_each(|finding| *counts.entry(of(finding, "severity")).or_insert(0) += 1);
        let count = |severity: &str| counts.get(severity).copied().unwrap_or(0);
        let stats = self.control.stats().unwrap();
        for (name, severity) in
            [("findings_certain", "certain"), ("findings_likely", "likely"), ("findings_noted", "note")]
        {
            assert_eq!(stats.get(name).unwrap(), count(severity), "{name}: {findings:#?}");
        }
        let at_fault = count("certain") + count("likely") > 0;
        let ended = self.backend.terminate(10 * SECOND).unwrap();
        assert_eq!(ended.status.code(), Some(i32::from(at_fault)), "{}", ended.stderr);
        for rule in rules {
            assert!(
                ended.stderr.contains(&format!(": {rule} (")),
                "{rule} was not printed: {}",
                ended.stderr
            );
        }
        assert!(ended.stderr.contains("mirrorgpu: findings about the front-end: "), "{}", ended.stderr);
    }
}

fn transfer(surface: &Surface) -> Command {
    Command::transfer(surface.resource, surface.rect(), 0)
}

fn is_of(iova: Iova, surface: &std::ops::Range<Iova>) -> bool {
    surface.contains(&iova)
}

fn pages_of(surface: &Surface) -> std::ops::Range<Iova> {
    let first = surface.buffer.address(0);
    first..first.plus(PAGES * PAGE)
}

/// Where the front-end has the frame behind a page of the surface.
fn user_of(guest: &SoftGuest, surface: &Surface, page: usize) -> UserAddr {
    guest.dma.space().frames().ram().user_addr(surface.buffer.frames()[page]).unwrap()
}

/// Answers MISSes for the surface like this, and all others rightly.
fn answer(guest: &SoftGuest, surface: &Surface, mut with: impl FnMut(u64) -> Answer + Send + 'static) {
    let pages = pages_of(surface);
    guest.front_end.on_miss(Box::new(move |miss| {
        if is_of(miss.iova, &pages) { with((miss.iova.0 - pages.start.0) / PAGE) } else { Answer::Serve }
    }));
}

/// Answers the MISSes of one transfer like this.
fn odd_answers(rules: &[&str], args: &[&str], with: impl Fn(&SoftGuest, &Surface)) {
    let trial = Trial::start(args);
    let (mut guest, surface) = trial.boot(GuestConfig::headless());
    with(&guest, &surface);
    guest.driver.run(&transfer(&surface)).unwrap();
    let mut trial = trial;
    rules.iter().for_each(|rule| drop(trial.found(rule)));
    drop(guest);
    trial.judge(rules);
}

/// Sends one message to a device that runs.
fn odd_message(rules: &[&str], number: u32, body: &[u8], fds: &[i32]) {
    let trial = Trial::start(&[]);
    let (guest, _surface) = trial.boot(GuestConfig::headless());
    // A reply that says no, or the end of the connection.
    let _ = guest.front_end.raw(number, ASK, body, fds);
    drop(guest);
    trial.judge(rules);
}

/// An UPDATE that nobody asked for, of the first page of a surface.
fn odd_update(rules: &[&str], update: impl Fn(Iova, UserAddr) -> IotlbMessage) {
    let trial = Trial::start(&[]);
    let (guest, surface) = trial.boot(GuestConfig::headless());
    let update = update(surface.buffer.address(0), user_of(&guest, &surface, 0));
    assert_ne!(guest.front_end.update(&update).unwrap().status, 0);
    drop(guest);
    trial.judge(rules);
}

/// A front-end that says only this, without waiting for anything.
fn odd_talk(rules: &[&str], talk: impl Fn(&UnixStream)) {
    let trial = Trial::start(&[]);
    let stream = trial.backend.connect().unwrap();
    talk(&stream);
    drop(stream);
    trial.judge(rules);
}

fn tell(stream: &UnixStream, number: u32, body: &[u8], fds: &[i32]) {
    wire::send(stream, number, VERSION, body, fds).unwrap();
}

/// A mapping is changed and nothing is said of it; then the device is asked to look.
fn silent_change(change: impl Fn(&SoftGuest, &Surface, Iova)) {
    let mut trial = Trial::start(&[]);
    let (mut guest, surface) = trial.boot(GuestConfig::headless());
    guest.driver.ok(&transfer(&surface)).unwrap();
    let page = surface.buffer.address(5 * PAGE);
    change(&guest, &surface, page);
    trial.control.execute("audit").unwrap();
    let found = trial.found("missing-invalidate");
    assert_eq!(
        (&found["range"], &found["access"]),
        (&json!(format!("{:#x}+0x1000", page.0)), &json!("read"))
    );
    let report = found["report"].as_str().unwrap();
    assert!(report.contains("which is resource 1 (backing entry 0, offset 0x5000)"), "{report}");
    drop(guest);
    trial.judge(&["missing-invalidate"]);
}

/// Each case is a test, and [`CASES`] has their rules.
macro_rules! cases {
    ($($name:ident [$($rule:literal),+] => $case:expr;)+) => {
        const CASES: &[&[&str]] = &[$(&[$($rule),+]),+];

        $(
            #[test]
            fn $name() {
                let case: fn(&[&str]) = $case;
                case(&[$($rule),+]);
            }
        )+
    };
}

cases! {
    an_update_for_another_page ["update-does-not-cover"] => |rules| odd_answers(rules, &[], |guest, surface| {
        let update = IotlbMessage::update(surface.buffer.address(0), PAGE, user_of(guest, surface, 0), PERM_BOTH);
        answer(guest, surface, move |page| match page {
            0 => Answer::Serve,
            _ => Answer::Odd { updates: vec![update], status: 0 },
        });
    });

    an_update_for_the_other_access ["update-lacks-permission"] => |rules| odd_answers(rules, &[], |guest, surface| {
        let updates: Vec<_> = (0..PAGES as usize).map(|page| {
            let (iova, user) = (surface.buffer.address(page as u64 * PAGE), user_of(guest, surface, page));
            IotlbMessage::update(iova, PAGE, user, PERM_WRITE)
        }).collect();
        answer(guest, surface, move |page| Answer::Odd { updates: vec![updates[page as usize]], status: 0 });
    });

    success_without_an_update ["miss-without-update"] => |rules| odd_answers(rules, &[], |guest, surface| {
        answer(guest, surface, |_| Answer::Odd { updates: Vec::new(), status: 0 });
    });

    a_miss_that_is_left_out ["answer-out-of-order"] => |rules| odd_answers(
        rules, &["--miss-timeout", "200ms"],
        |guest, surface| answer(guest, surface, |page| if page == 3 { Answer::Silence } else { Answer::Serve }),
    );

    misses_that_are_never_answered ["miss-late", "miss-unanswered"] => |rules| odd_answers(
        rules, &["--miss-timeout", "100ms"],
        |guest, surface| answer(guest, surface, |_| Answer::Silence),
    );

    a_reply_too_many ["answer-unasked"] => |rules| {
        let mut trial = Trial::start(&[]);
        let (mut guest, surface) = trial.boot(GuestConfig::headless());
        guest.driver.ok(&transfer(&surface)).unwrap();
        guest.front_end.on_miss(Box::new(|_| Answer::ServeTwice));
        guest.front_end.invalidate(surface.buffer.address(0), PAGE).unwrap();
        guest.driver.run(&transfer(&surface)).unwrap();
        trial.found(rules[0]);
        drop(guest);
        trial.judge(rules);
    };

    a_reply_of_another_size ["answer-malformed"] => |rules| {
        let mut trial = Trial::start(&["--miss-timeout", "200ms"]);
        let (mut guest, surface) = trial.boot(GuestConfig::headless());
        guest.front_end.on_miss(Box::new(|_| Answer::ServeGarbled));
        let _ = guest.driver.submit(&transfer(&surface)).unwrap();
        trial.found(rules[0]);
        drop(guest);
        trial.judge(rules);
    };

    an_update_of_nothing ["update-without-range"] => |rules| odd_update(rules, |iova, user| {
        IotlbMessage::update(iova, 0, user, PERM_BOTH)
    });

    an_update_that_allows_nothing ["update-bad-permission"] => |rules| odd_update(rules, |iova, user| {
        IotlbMessage::update(iova, PAGE, user, 0)
    });

    an_update_to_nowhere ["update-outside-memory"] => |rules| odd_update(rules, |iova, _| {
        IotlbMessage::update(iova, PAGE, UserAddr(0x1000), PERM_READ)
    });

    an_update_across_regions ["update-outside-memory"] => |rules| {
        let trial = Trial::start(&[]);
        let (guest, surface) = trial.boot(GuestConfig::headless());
        let low = guest.dma.space().frames().ram().regions()[0];
        let end = low.user.plus(low.len - PAGE);
        let update = IotlbMessage::update(surface.buffer.address(0), 0x3_0000, end, PERM_BOTH);
        assert_ne!(guest.front_end.update(&update).unwrap().status, 0);
        drop(guest);
        trial.judge(rules);
    };

    a_miss_from_the_wrong_side ["iotlb-bad-type"] => |rules| odd_update(rules, |iova, user| {
        IotlbMessage::new(iova, PAGE, user, PERM_READ, wire::IOTLB_MISS)
    });

    an_update_that_says_more_and_one_that_nobody_wanted ["update-claims-more", "update-unasked"] => |rules| {
        let trial = Trial::start(&[]);
        let (mut guest, surface) = trial.boot(GuestConfig::headless());
        guest.driver.ok(&transfer(&surface)).unwrap();
        let update =
            IotlbMessage::update(surface.buffer.address(0), PAGE, user_of(&guest, &surface, 0), PERM_BOTH);
        assert_eq!(guest.front_end.update(&update).unwrap().status, 0);
        drop(guest);
        trial.judge(rules);
    };

    // The reply may be read before the UPDATE that was sent ahead of it on the other socket: that is no missing UPDATE.
    an_update_whose_ack_nobody_awaits ["update-not-awaited"] => |rules| {
        let trial = Trial::start(&[]);
        let (mut guest, surface) = trial.boot(GuestConfig::headless());
        answer(&guest, &surface, |_| Answer::ServeHasty);
        for _ in 0..50 {
            guest.driver.run(&transfer(&surface)).unwrap();
            guest.front_end.invalidate(surface.buffer.address(0), PAGES * PAGE).unwrap();
        }
        drop(guest);
        trial.judge(rules);
    };

    a_page_that_moves_in_silence ["missing-invalidate"] => |_| silent_change(|guest, surface, page| {
        let frame = guest.dma.space().frames().take(1).unwrap()[0];
        guest.dma.space().iommu().map(page, frame, surface.buffer.permission());
    });

    a_page_that_vanishes_in_silence ["missing-invalidate"] => |_| silent_change(|guest, _, page| {
        guest.dma.space().iommu().unmap(page, 1);
    });

    an_invalidate_without_a_wish_for_an_ack ["invalidate-not-awaited"] => |rules| {
        let mut trial = Trial::start(&[]);
        let (guest, surface) = trial.boot(GuestConfig::headless());
        let message = IotlbMessage::invalidate(surface.buffer.address(0), PAGE);
        tell(&guest.front_end.main_socket().unwrap(), request::IOTLB_MSG, message.as_bytes(), &[]);
        trial.found(rules[0]);
        drop(guest);
        trial.judge(rules);
    };

    memory_that_is_unplugged_while_it_is_mapped ["region-removed-while-mapped"] => |rules| {
        for memory_slots in [true, false] {
            let trial = Trial::start(&[]);
            let mut config = GuestConfig::headless();
            config.front_end.memory_slots = memory_slots;
            config.ram.module = 1 << 20;
            let mut guest = SoftGuest::boot(&trial.backend, config).unwrap();
            let frames = guest.dma.space().frames().ram().module_frames();
            let buffer = guest.dma.space().map(frames, Permission::ReadWrite);
            let surface = guest.surface_on(buffer, Format::B8G8R8X8, SIDE, SIDE).unwrap();
            guest.driver.ok(&transfer(&surface)).unwrap();
            let all = guest.dma.space().frames().ram().regions().to_vec();
            guest.front_end.set_memory(&all[..3]).unwrap();
            drop(guest);
            trial.judge(rules);
        }
    };

    a_ring_that_is_resized_while_it_runs ["ring-changed-while-running"] => |rules| {
        for number in [SET_VRING_NUM, SET_VRING_BASE] {
            odd_message(rules, number, &words(&[0, 64]), &[]);
        }
    };

    a_ring_that_is_moved_while_it_runs ["ring-moved-while-running"] => |rules| {
        let mut addresses = words(&[1, 0]);
        addresses.resize(40, 0);
        odd_message(rules, SET_VRING_ADDR, &addresses, &[]);
        let kick = EventFd::new(0).unwrap();
        odd_message(rules, SET_VRING_KICK, &words(&[1, 0]), &[kick.as_raw_fd()]);
    };

    features_that_change_while_a_ring_runs ["features-changed-while-running"] => |rules| {
        let trial = Trial::start(&[]);
        let (guest, _surface) = trial.boot(GuestConfig::headless());
        let features = guest.front_end.features() & !front_end::feature::EDID;
        assert_ne!(guest.front_end.raw(SET_FEATURES, ASK, &features.to_ne_bytes(), &[]).unwrap().number(), Some(0));
        drop(guest);
        trial.judge(rules);
    };

    a_ring_that_is_not_there ["ring-not-there"] => |rules| {
        odd_message(rules, SET_VRING_NUM, &words(&[2, 64]), &[]);
        odd_message(rules, request::GET_VRING_BASE, &words(&[7, 0]), &[]);
    };

    a_ring_that_is_started_without_anything ["ring-not-set-up", "owner-not-set"] => |rules| odd_talk(rules, |stream| {
        tell(stream, SET_FEATURES, &PROTOCOL_FEATURES.to_ne_bytes(), &[]);
        let kick = EventFd::new(0).unwrap();
        tell(stream, SET_VRING_KICK, &words(&[0, 0]), &[kick.as_raw_fd()]);
        tell(stream, SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    });

    a_ring_that_is_stopped_twice ["stop-of-stopped-ring"] => |rules| {
        let trial = Trial::start(&[]);
        let (mut guest, _surface) = trial.boot(GuestConfig::headless());
        guest.stop().unwrap();
        guest.front_end.raw(request::GET_VRING_BASE, VERSION, &words(&[0, 0]), &[]).unwrap();
        drop(guest);
        trial.judge(rules);
    };

    a_reset_of_a_device_that_runs ["reset-while-running"] => |rules| odd_message(rules, RESET_DEVICE, &[], &[]);

    a_reset_of_the_owner ["owner-reset"] => |rules| odd_message(rules, RESET_OWNER, &[], &[]);

    a_front_end_that_is_just_gone ["left-while-running"] => |rules| {
        let trial = Trial::start(&[]);
        drop(trial.boot(GuestConfig::headless()));
        trial.judge(rules);
    };

    a_message_whose_feature_nobody_offered ["message-not-negotiated"] => |rules| {
        odd_message(rules, SET_STATUS, &[0; 8], &[]);
    };

    iotlb_messages_without_an_iommu ["iotlb-not-negotiated"] => |rules| {
        let trial = Trial::start(&[]);
        let (guest, surface) = trial.boot(GuestConfig { display: None, ..GuestConfig::without_iommu() });
        guest.front_end.invalidate(surface.buffer.address(0), PAGE).unwrap();
        drop(guest);
        trial.judge(rules);
    };

    a_wish_for_a_reply_that_nobody_promised ["reply-not-negotiated"] => |rules| odd_talk(rules, |stream| {
        wire::send(stream, SET_OWNER, ASK, &[], &[]).unwrap();
    });

    features_that_nobody_offered ["feature-not-offered"] => |rules| odd_talk(rules, |stream| {
        tell(stream, SET_FEATURES, &(PROTOCOL_FEATURES | 1 << 60).to_ne_bytes(), &[]);
    });

    protocol_features_that_nobody_offered ["protocol-feature-not-offered"] => |rules| odd_talk(rules, |stream| {
        tell(stream, SET_PROTOCOL_FEATURES, &(1_u64 << 63).to_ne_bytes(), &[]);
    });

    ring_features_that_are_passed_on ["feature-passed-on"] => |rules| {
        let trial = Trial::start(&[]);
        drop(trial.boot(GuestConfig::headless()));
        trial.judge(rules);
    };

    a_message_of_no_protocol ["message-unknown"] => |rules| odd_talk(rules, |stream| tell(stream, 45, &[], &[]));

    a_message_of_another_size ["message-size"] => |rules| odd_talk(rules, |stream| {
        tell(stream, SET_FEATURES, &[0; 7], &[]);
    });

    a_reply_to_nothing ["message-header"] => |rules| odd_talk(rules, |stream| {
        wire::send(stream, SET_OWNER, VERSION | REPLY, &[], &[]).unwrap();
    });

    half_a_message ["message-cut-off"] => |rules| {
        let mut trial = Trial::start(&[]);
        let stream = trial.backend.connect().unwrap();
        wire::send_bytes(&stream, &wire::encode(SET_FEATURES, VERSION, &[0; 8])[..15], &[]).unwrap();
        trial.found(rules[0]);
        trial.judge(rules);
    };

    descriptors_that_are_missing ["descriptors-wrong"] => |rules| odd_talk(rules, |stream| {
        tell(stream, GPU_SET_SOCKET, &[], &[]);
    });

    a_file_that_shrinks ["memory-truncated"] => |rules| {
        let mut trial = Trial::start(&[]);
        let ram = RamConfig { sealed: false, ..RamConfig::default() };
        let (mut guest, surface) = trial.boot(GuestConfig { ram, ..GuestConfig::headless() });
        let _ = guest.driver.submit(&transfer(&surface)).unwrap();
        guest.dma.space().frames().ram().truncate(1 << 20).unwrap();
        guest.driver.ring(Queue::Control).kick().unwrap();
        trial.found(rules[0]);
        drop(guest);
        trial.judge(rules);
    };

    a_request_that_we_refuse ["request-refused"] => |rules| {
        let trial = Trial::start(&[]);
        let (mut guest, _surface) = trial.boot(GuestConfig::headless());
        guest.stop().unwrap();
        let reply = guest.front_end.raw(SET_VRING_NUM, ASK, &words(&[0, 3]), &[]).unwrap();
        assert_ne!(reply.number(), Some(0));
        drop(guest);
        trial.judge(rules);
    };
}

#[test]
fn each_rule_has_a_case() {
    let page = include_str!("../../backend/FRONT_END.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let rules: BTreeSet<_> = rows.collect();
    let cases: BTreeSet<_> = CASES.iter().flat_map(|rules| rules.iter().copied()).collect();
    assert!(rules.len() > 30, "{rules:?}");
    assert_eq!(cases, rules);
}

/// Each kind of front-end that keeps the rules: with an IOMMU or without, with memory slots or tables, with resets that
/// are announced or not.
fn correct_front_ends() -> Vec<GuestConfig> {
    let mut configs = Vec::new();
    for (iommu, memory_slots, announce_reset) in [
        (true, true, true),
        (true, false, true),
        (true, true, false),
        (false, true, true),
        (false, false, false),
    ] {
        let mut config = GuestConfig::default();
        let front_end = &mut config.front_end;
        (front_end.iommu, front_end.memory_slots, front_end.announce_reset) =
            (iommu, memory_slots, announce_reset);
        config.driver.fresh_buffers = true;
        config.ram.module = 1 << 20;
        configs.push(config);
    }
    configs
}

/// Draws, with buffers that come and go: unmapped at once, or with a flush of everything under what runs.
fn draw(guest: &mut SoftGuest, lazy: bool) {
    let image = picture(SIDE, SIDE, u32::from(lazy) + 1);
    let surface = guest.surface(Format::B8G8R8X8, SIDE, SIDE).unwrap();
    surface.draw(&image).unwrap();
    for round in 0..20 {
        let tickets: Vec<_> = (0..8).map(|_| guest.driver.submit(&transfer(&surface)).unwrap()).collect();
        if lazy && round % 2 == 0 && guest.front_end.has_iommu() {
            guest.dma.flush().unwrap();
        }
        tickets.into_iter().for_each(|ticket| drop(guest.driver.wait_ok(ticket).unwrap()));
        for buffer in guest.driver.spent_buffers() {
            match (guest.front_end.has_iommu(), lazy) {
                (false, _) => drop(buffer),
                (true, true) => guest.dma.unmap_later(buffer).unwrap(),
                (true, false) => drop(guest.dma.unmap(buffer).unwrap()),
            }
        }
    }
    guest.must_show(&surface, &image).unwrap();
    guest.driver.ok(&Command::set_scanout(0, 0, Default::default())).unwrap();
    if guest.front_end.has_iommu() {
        guest.free(surface).unwrap();
        guest.dma.flush().unwrap();
    }
}

/// Asks for all that the mirror holds again, and waits for the end of that.
fn audit(trial: &mut Trial) {
    trial.control.execute_with("audit", json!({"restart": true})).unwrap();
    let done = trial.control.event("AUDIT_DONE").unwrap();
    assert_eq!((&done["stale"], &done["interrupted"]), (&json!([]), &json!(false)), "{done}");
    assert!(done["checked"].as_u64().unwrap() > 0, "{done}");
}

#[test]
fn a_front_end_that_keeps_the_rules_is_clean_whatever_its_guest_does() {
    for config in correct_front_ends() {
        let mut trial = Trial::start(&["--inject", "step-delay=200us"]);
        let mut guest = SoftGuest::boot(&trial.backend, config).unwrap();
        let all = guest.dma.space().frames().ram().regions().to_vec();
        for lazy in [false, true] {
            draw(&mut guest, lazy);
            guest.stop().unwrap();
            guest.start().unwrap();
            draw(&mut guest, lazy);
            // The module goes and comes back, with nothing in it.
            guest.front_end.set_memory(&all[..3]).unwrap();
            guest.front_end.set_memory(&all).unwrap();
            guest.driver.ok(&Command::display_info()).unwrap();
            if guest.front_end.has_iommu() {
                audit(&mut trial);
                dma_api::burst()
                    .iter()
                    .for_each(|&(iova, size)| drop(guest.front_end.invalidate(iova, size)));
            }
            guest.reboot().unwrap();
        }
        guest.stop().unwrap();
        drop(guest);
        // Not even that it has left.
        trial.wait_for_the_end();
        let findings = trial.findings();
        let usual = |finding: &Value| {
            let rule = finding["rule"].as_str().unwrap();
            USUAL.contains(&rule) && rule != "left-while-running"
        };
        assert!(findings.iter().all(usual), "{config:?}: {findings:#?}");
        trial.judge(&[]);
    }
}

#[test]
fn answers_of_any_correct_kind_are_clean() {
    for manner in [Answer::ServeRun, Answer::ServeTorn, Answer::Refuse] {
        let trial = Trial::start(&[]);
        let (mut guest, surface) = trial.boot(GuestConfig::headless());
        let (kind, refused) = (manner.clone(), matches!(manner, Answer::Refuse));
        answer(&guest, &surface, move |_| kind.clone());
        let ticket = guest.driver.submit(&transfer(&surface)).unwrap();
        if matches!(manner, Answer::ServeTorn) {
            // Taken away between its UPDATE and its reply, a page is asked for again.
            assert!(guest.front_end.wait_for_misses(5 * SECOND, |counts| counts.torn == 1));
            guest.front_end.invalidate(surface.buffer.address(0), PAGES * PAGE).unwrap();
            guest.front_end.release_replies();
        }
        assert_eq!(guest.driver.wait(ticket).unwrap().kind() == kind::ERR_UNSPEC, refused);
        drop(guest);
        trial.judge(&[]);
    }
}

#[test]
fn a_page_that_changes_before_its_invalidate_is_no_finding() {
    let mut trial = Trial::start(&[]);
    let (mut guest, surface) = trial.boot(GuestConfig::headless());
    guest.driver.ok(&transfer(&surface)).unwrap();
    let page = surface.buffer.address(0);
    let frame = guest.dma.space().frames().take(1).unwrap()[0];
    guest.dma.space().iommu().map(page, frame, surface.buffer.permission());
    let seen = guest.front_end.miss_counts().seen;
    trial.control.execute("audit").unwrap();
    assert!(guest.front_end.wait_for_misses(5 * SECOND, |counts| counts.seen > seen + PAGES));
    guest.front_end.invalidate(page, PAGE).unwrap();
    trial.control.event("AUDIT_DONE").unwrap();
    // One that changes later, and of which nothing is said: once that is found, the first would have been long ago.
    let later = surface.buffer.address(9 * PAGE);
    guest.dma.space().iommu().map(later, frame, surface.buffer.permission());
    trial.control.execute_with("audit", json!({"restart": true})).unwrap();
    let found = trial.found("missing-invalidate");
    assert_eq!(found["range"], json!(format!("{:#x}+0x1000", later.0)));
    let all = trial.findings().into_iter().filter(|finding| finding["rule"] == "missing-invalidate");
    assert_eq!(all.count(), 1);
    drop(guest);
    trial.judge(&["missing-invalidate"]);
}

#[test]
fn what_is_found_is_told_to_whoever_listens_and_counted_over_connections() {
    let mut trial = Trial::start(&[]);
    for _ in 0..2 {
        let (guest, surface) = trial.boot(GuestConfig::headless());
        for _ in 0..3 {
            let update = IotlbMessage::update(surface.buffer.address(0), PAGE, UserAddr(0x1000), PERM_BOTH);
            guest.front_end.update(&update).unwrap();
        }
        let event = loop {
            let event = trial.control.event("FINDING").unwrap();
            if event["rule"] == "update-outside-memory" {
                break event;
            }
        };
        assert_eq!((&event["severity"], &event["message"]), (&json!("certain"), &json!("IOTLB_MSG")));
        assert_eq!(event["range"], json!(format!("{:#x}+0x1000", surface.buffer.address(0).0)));
        assert!(
            event["report"].as_str().unwrap().contains("what to do    send the memory table before"),
            "{event}"
        );
        assert!(trial.findings().contains(&event));
        drop(guest);
        trial.wait_for_the_end();
    }
    // Once a connection and page, however often it is done.
    let counts = trial.control.execute("findings").unwrap()["counts"].clone();
    assert_eq!(counts["update-outside-memory"], 2, "{counts}");
    trial.judge(&["update-outside-memory"]);
}

#[test]
fn without_the_flag_nothing_is_judged() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let update = IotlbMessage::update(Iova(0), PAGE, UserAddr(0x1000), PERM_BOTH);
    assert_ne!(guest.front_end.update(&update).unwrap().status, 0);
    let answer = backend.control().unwrap().execute("findings").unwrap();
    assert_eq!(answer, json!({"checking": false, "findings": [], "dropped": 0, "counts": {}}));
    drop(guest);
    let ended = backend.terminate(10 * SECOND).unwrap();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(
        !ended.stderr.contains("Finding ") && !ended.stderr.contains("findings about"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_process_that_cannot_work_ends_with_another_code_than_one_that_finds_something() {
    let ended = backend::run(&["--socket-path", "/nonexistent/gpu.sock", FLAG]).unwrap();
    assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
    let ended = backend::run(&["--socket-path", "/nonexistent/gpu.sock"]).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
}
