//! What is left of the file system (landlock(7)): traces may be written into the folder of `--record-dir`, and the sockets
//! of the process may be removed. Nothing else can be opened, read, executed or changed; TCP ports and abstract sockets
//! cannot be reached. Descriptors that are open stay usable.

use std::os::fd::AsFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::{Failure, Needs};

/// The newest version of the kernel's interface that this was tested with. An older kernel enforces what it knows.
const NEWEST: ABI = ABI::V7;
/// The oldest one, of Linux 5.13.
const OLDEST: ABI = ABI::V1;

/// The rules.
pub(super) struct Folders {
    rules: RulesetCreated,
    summary: String,
}

impl Folders {
    /// Fails if the kernel has no landlock.
    pub(super) fn new(needs: &Needs<'_>) -> Result<Self, Failure> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(OLDEST))?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::AbstractUnixSocket)?
            .create()?;
        for socket in &needs.sockets {
            rules = rules.add_rule(PathBeneath::new(socket.directory(), AccessFs::RemoveFile))?;
        }
        if let Some(record) = needs.record {
            let access = AccessFs::MakeReg | AccessFs::WriteFile | AccessFs::Truncate;
            rules = rules.add_rule(PathBeneath::new(record.as_fd(), access))?;
        }
        let files = if needs.record.is_some() { "no files but traces" } else { "no files" };
        Ok(Self { rules, summary: format!("landlock ({files})") })
    }

    pub(super) fn restrict_this_thread(&self) -> Result<(), Failure> {
        match self.rules.try_clone()?.restrict_self()?.ruleset {
            RulesetStatus::NotEnforced => Err("the kernel does not enforce it".into()),
            RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
        }
    }

    pub(super) fn summary(&self) -> String {
        self.summary.clone()
    }
}
