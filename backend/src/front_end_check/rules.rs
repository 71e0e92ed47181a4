//! The table of rules: the requirement, how certain a finding is, where the rule is written, and what to do. Names,
//! report texts, `--help` and the documentation come from it. Knows nothing of how a rule is checked.

/// How strongly a finding counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// No correct front-end does this.
    Certain,
    /// A correct front-end does this only by an accident that cannot be ruled out, or for a mistake of its guest.
    Likely,
    /// Allowed or harmless: kept as information, and not counted against the front-end.
    Note,
}

impl Severity {
    /// All severities, the most serious first.
    pub const ALL: [Self; 3] = [Self::Certain, Self::Likely, Self::Note];

    /// Its name in reports and on the control socket.
    pub fn name(self) -> &'static str {
        match self {
            Self::Certain => "certain",
            Self::Likely => "likely",
            Self::Note => "note",
        }
    }

    /// What such a finding says about the front-end.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Certain => "no correct front-end does this",
            Self::Likely => {
                "a correct front-end could look like this by accident, or because of a bug of its guest"
            }
            Self::Note => "allowed or harmless (QEMU does some of it); does not count against the front-end",
        }
    }

    /// Whether such a finding counts against the front-end.
    pub fn accuses(self) -> bool {
        self != Self::Note
    }
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The rule itself.
    pub rule: Rule,
    /// Its name for users.
    pub name: &'static str,
    /// How strongly a finding counts.
    pub severity: Severity,
    /// Where it is written: a section of QEMU's docs/interop/vhost-user.rst, or another source.
    pub section: &'static str,
    /// What the front-end did.
    pub deed: &'static str,
    /// What the author of the front-end should do.
    pub advice: &'static str,
}

/// Generates the rules and their table from one list.
macro_rules! rules {
    ($($rule:ident = $name:literal, $severity:ident, $section:literal, $deed:literal, $advice:literal;)+) => {
        /// A requirement on a front-end.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Rule {
            $(#[doc = $deed] $rule,)+
        }

        /// All rules, grouped by subject.
        pub const RULES: &[Row] = &[$(Rule::$rule.row(),)+];

        impl Rule {
            /// The rule's row.
            pub const fn row(self) -> Row {
                match self {
                    $(Self::$rule => Row {
                        rule: self,
                        name: $name,
                        severity: Severity::$severity,
                        section: $section,
                        deed: $deed,
                        advice: $advice,
                    },)+
                }
            }
        }
    };
}

rules! {
    // UPDATEs and the MISSes that they answer.
    UpdateDoesNotCover = "update-does-not-cover", Certain, "IOMMU support",
        "A MISS was answered with success, and its UPDATE does not cover the page that it asked for.",
        "send the part of the mapping that holds the address asked for. (QEMU 10 does this where a huge page of the \
         IOMMU lies over a hole in the guest's memory)";
    UpdateLacksPermission = "update-lacks-permission", Certain, "IOMMU support",
        "A MISS was answered with success, and its UPDATE does not allow what it asked for.",
        "refuse the MISS (a reply that is not 0) where the IOMMU does not allow the access";
    MissWithoutUpdate = "miss-without-update", Likely, "IOMMU support",
        "A MISS was answered with success, and no UPDATE came before the answer.",
        "send the UPDATE first, or refuse the MISS. (The specification may be read so that success without an UPDATE \
         means an invalid address; then the device can never tell a fault from a lost message)";
    UpdateOutsideMemory = "update-outside-memory", Certain, "IOMMU support",
        "An UPDATE points outside of the memory table, or across two of its regions.",
        "send the memory table before UPDATEs that use it, and one UPDATE for each region";
    UpdateWithoutRange = "update-without-range", Certain, "An IOTLB message",
        "An UPDATE is of size 0, or passes the end of an address space.",
        "compute the size as the IOMMU's address mask plus 1, and cut it where the region ends";
    UpdateBadPermission = "update-bad-permission", Certain, "An IOTLB message",
        "An UPDATE allows nothing, or has bits of permission that do not exist.",
        "1 is read, 2 is write, 3 is both; what allows nothing is an INVALIDATE";
    IotlbBadType = "iotlb-bad-type", Certain, "An IOTLB message",
        "An IOTLB message on the main socket is neither UPDATE (2) nor INVALIDATE (3).",
        "MISS and access failure are the back-end's messages, and go the other way";
    UpdateClaimsMore = "update-claims-more", Note, "An IOTLB message",
        "An UPDATE allows more than the MISS asked for.",
        "nothing, if the IOMMU allows it. QEMU says read and write whatever the IOMMU allows, so a back-end must only \
         believe what it has asked for";
    UpdateUnasked = "update-unasked", Note, "IOMMU support",
        "An UPDATE came that no MISS had asked for.",
        "nothing: QEMU sends the pages of the used rings at each start. A back-end may ignore them";
    UpdateNotAwaited = "update-not-awaited", Note, "VHOST_USER_IOTLB_MSG",
        "An UPDATE came without NEED_REPLY: it may be read after the reply to its MISS, which takes another way.",
        "wait for the ack of the UPDATE before the MISS is answered, as QEMU does. MirrorGPU may take the MISS for one \
         that was answered without an UPDATE, and fail the job";

    // What a vIOMMU owes.
    MissingInvalidate = "missing-invalidate", Likely, "IOMMU support",
        "A mapping that the device still holds has changed or is gone, and no INVALIDATE has said so.",
        "send INVALIDATE for what the guest unmaps, before the guest is told that its flush is done. (A guest that \
         changes its tables and does not flush looks the same)";
    InvalidateNotAwaited = "invalidate-not-awaited", Certain, "IOMMU support",
        "An INVALIDATE came without NEED_REPLY: the front-end does not wait until the device has stopped using the range.",
        "set NEED_REPLY, and let the guest's flush end only after the reply: until then the device may still write to \
         the old page";
    RegionRemovedWhileMapped = "region-removed-while-mapped", Note, "Memory access",
        "A region of the memory table goes away while translations lead into it that no INVALIDATE has taken away.",
        "nothing, where translation is off: QEMU sends no INVALIDATE for an unplug then, and a back-end has to forget \
         all that leads there";

    // Replies on the back-end channel.
    MissLate = "miss-late", Note, "Back-end communication",
        "A MISS was not answered within the miss timeout.",
        "answer MISSes from a thread that nothing blocks; a busy host looks the same. It becomes miss-unanswered if \
         no answer comes at all";
    MissUnanswered = "miss-unanswered", Likely, "VHOST_USER_PROTOCOL_F_REPLY_ACK",
        "A MISS with NEED_REPLY was never answered: not within ten times the miss timeout, or before the connection \
         ended.",
        "answer each MISS once: UPDATE and 0, or another number if the IOMMU does not allow the access";
    AnswerOutOfOrder = "answer-out-of-order", Likely, "Back-end communication",
        "A MISS was answered with success when only the UPDATE of a later MISS had come.",
        "answer MISSes in their order: a reply carries no number, so one that is left out or late shifts all that \
         follow. (Answers are not judged any more until all are in)";
    AnswerUnasked = "answer-unasked", Certain, "Back-end communication",
        "A reply came on the back-end channel to which no MISS belongs.",
        "reply once to each message that has NEED_REPLY set, and to no other";
    AnswerMalformed = "answer-malformed", Certain, "Header",
        "What came on the back-end channel is no reply to a MISS.",
        "send 12 bytes of header (request 1, the reply flag, size 8) and 8 bytes of payload";

    // The order of ring messages.
    RingChangedWhileRunning = "ring-changed-while-running", Certain, "Ring states",
        "The size or the base of a ring was set while it ran.",
        "stop the ring first (GET_VRING_BASE). The vhost of Linux answers this with EBUSY";
    RingMovedWhileRunning = "ring-moved-while-running", Likely, "Ring states",
        "The addresses or the kick descriptor of a ring were set while it ran.",
        "stop the ring first (GET_VRING_BASE). Only the log flag of an address may change on the fly, where dirty \
         logging was negotiated";
    FeaturesChangedWhileRunning = "features-changed-while-running", Likely, "Migration",
        "The virtio features were changed while a ring ran.",
        "stop all rings first. Only VHOST_F_LOG_ALL may change on the fly, where it was offered";
    RingNotSetUp = "ring-not-set-up", Likely, "Ring states",
        "A ring was kicked off and enabled without a size, addresses, or any memory table.",
        "send the memory table, SET_VRING_NUM, SET_VRING_BASE and SET_VRING_ADDR before SET_VRING_KICK";
    RingNotThere = "ring-not-there", Certain, "Multiple queue support",
        "A message names a ring that the device does not have.",
        "ask for the number of rings (GET_QUEUE_NUM), and stay below";
    StopOfStoppedRing = "stop-of-stopped-ring", Note, "VHOST_USER_GET_VRING_BASE",
        "GET_VRING_BASE came for a ring that had not been started.",
        "nothing: it is answered with the base that was set last";
    ResetWhileRunning = "reset-while-running", Note, "VHOST_USER_RESET_DEVICE",
        "The device was reset while a ring ran.",
        "nothing: the back-end disables all rings. QEMU stops them first";
    LeftWhileRunning = "left-while-running", Note, "Communication",
        "The front-end closed the connection while a ring ran.",
        "nothing, if it was ended by force; else stop the rings first (GET_VRING_BASE), as QEMU does at its end";
    OwnerNotSet = "owner-not-set", Note, "VHOST_USER_SET_OWNER",
        "A ring was started before SET_OWNER had come.",
        "send SET_OWNER once a connection: back-ends may wait for it";
    OwnerReset = "owner-reset", Note, "VHOST_USER_RESET_OWNER",
        "RESET_OWNER came, which is deprecated.",
        "use RESET_DEVICE where it was negotiated: back-ends do not agree on what RESET_OWNER means";

    // What was negotiated.
    MessageNotNegotiated = "message-not-negotiated", Certain, "Protocol features",
        "A message came whose feature was not negotiated.",
        "set the feature first (SET_PROTOCOL_FEATURES, SET_FEATURES), where it is offered";
    IotlbNotNegotiated = "iotlb-not-negotiated", Certain, "VHOST_USER_IOTLB_MSG",
        "An IOTLB message came without VIRTIO_F_ACCESS_PLATFORM.",
        "send UPDATE and INVALIDATE only while bit 33 is set: without it addresses are guest-physical, and the memory \
         table is the only mapping";
    ReplyNotNegotiated = "reply-not-negotiated", Certain, "VHOST_USER_PROTOCOL_F_REPLY_ACK",
        "A message has NEED_REPLY set, and REPLY_ACK was not negotiated.",
        "leave bit 3 of the flags 0: no reply will come, and a front-end that waits for one waits for ever";
    FeatureNotOffered = "feature-not-offered", Certain, "VHOST_USER_SET_FEATURES",
        "Virtio features were set that the back-end does not offer.",
        "take away from what the guest may choose what GET_FEATURES does not give";
    FeaturePassedOn = "feature-passed-on", Note, "VHOST_USER_SET_FEATURES",
        "Ring features were set that the back-end does not offer.",
        "nothing here. QEMU's vhost-user-gpu passes on what the guest chose (indirect descriptors, event index, ring \
         reset); a back-end that ignores them may hang";
    ProtocolFeatureNotOffered = "protocol-feature-not-offered", Certain, "VHOST_USER_SET_PROTOCOL_FEATURES",
        "Protocol features were set that the back-end does not offer.",
        "set a subset of what GET_PROTOCOL_FEATURES gives";

    // The form of messages.
    MessageUnknown = "message-unknown", Certain, "Front-end message types",
        "A message came that the protocol does not have.",
        "messages are numbered from 1 (GET_FEATURES) to 44 (GET_SHMEM_CONFIG)";
    MessageSize = "message-size", Certain, "Front-end message types",
        "A message has more or less payload than its type.",
        "compare the payload with the description of its type";
    MessageHeader = "message-header", Certain, "Header",
        "What came on the main socket is no request.",
        "a request has version 1, no reply flag, and at most 4096 bytes of payload";
    MessageCutOff = "message-cut-off", Likely, "Communication",
        "A message was left unfinished for seconds.",
        "write messages whole";
    DescriptorsWrong = "descriptors-wrong", Likely, "Communication",
        "A message came with more or fewer file descriptors than its type has.",
        "pass them in the ancillary data of the message's first byte. (They are lost too where the back-end has \
         reached --max-descriptors)";
    MemoryTruncated = "memory-truncated", Certain, "Memory access",
        "A file behind the guest's memory became shorter than the memory table says.",
        "take the region out of the table first, and seal the file against shrinking";
    RequestRefused = "request-refused", Note, "VHOST_USER_PROTOCOL_F_REPLY_ACK",
        "MirrorGPU refused a request, for a reason of the request or for a limit of its own.",
        "read the reason";
}

/// One-line help of the flag.
pub(crate) const SHORT_HELP: &str = "Check the front-end against the vhost-user protocol; exit with 1 if it breaks a rule (--help lists them)";

/// Help of the flag with all rules, for `--help`.
pub(crate) fn long_help() -> String {
    let mut help =
        "Check the front-end against the vhost-user protocol, and against what a vIOMMU has to guarantee its \
         devices. Without this option the front-end is not checked.\n\n\
         Each finding is reported once for each message or page: on standard error, and on the control socket as an \
         event and by the command findings. It is counted in stats. The exit code is 0 if nothing was found, 1 if \
         something certain or likely was found, and 2 if mirrorgpu itself failed. Notes do not count. What to do \
         about each: backend/FRONT_END.md. The rules:\n"
            .to_owned();
    for severity in Severity::ALL {
        help.push_str(&format!("\n{} ({}):\n", severity.name(), severity.meaning()));
        for row in RULES.iter().filter(|row| row.severity == severity) {
            help.push_str(&format!("  {}: {}\n", row.name, row.deed));
        }
    }
    help
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The page of the documentation, which contains this table.
    const PAGE: &str = include_str!("../../FRONT_END.md");

    fn markdown() -> String {
        let mut text = String::from("| rule | severity | what the front-end did | section | what to do |\n");
        text.push_str("|---|---|---|---|---|\n");
        for Row { name, severity, section, deed, advice, .. } in RULES {
            text.push_str(&format!("| `{name}` | {} | {deed} | {section} | {advice} |\n", severity.name()));
        }
        text
    }

    #[test]
    fn each_rule_has_a_name_of_its_own_and_its_own_row() {
        let names: BTreeSet<_> = RULES.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), RULES.len());
        for row in RULES {
            assert_eq!(row.rule.row(), *row);
            assert!(row.deed.ends_with('.') && !row.advice.ends_with('.'), "{}", row.name);
        }
    }

    #[test]
    fn the_documentation_has_this_table() {
        let table = markdown();
        assert!(PAGE.contains(&table), "FRONT_END.md should have this table:\n{table}");
    }

    #[test]
    fn the_help_names_each_rule_under_its_severity() {
        let help = long_help();
        for row in RULES {
            assert!(help.contains(&format!("  {}: {}", row.name, row.deed)), "{}", row.name);
        }
        let at = |text: &str| help.find(text).unwrap_or_else(|| panic!("{text}: {help}"));
        assert!(
            at("\ncertain (") < at("update-outside-memory") && at("update-outside-memory") < at("\nlikely (")
        );
        assert!(at("\nnote (") < at("left-while-running"));
    }
}
