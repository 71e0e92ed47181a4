//! The command line: every flag with its unit, its default and its bounds. Knows text only; opens nothing.

mod values;

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum, value_parser};
use device_model::jobs::address_space::TlbPolicy;
use job_stream::Mode;
use log::LevelFilter;

use crate::fault_injection::{self, Setting};
use crate::front_end_check;
use crate::sandbox::Level;

/// Most engine threads that are started unless more are asked for.
const DEFAULT_ENGINES: usize = 4;

/// The headings of `--help`, in its order. That of the limits is at [`QuotaArgs`].
const CONNECTION: &str = "Connection";
const DISPLAY: &str = "Display";
const JOBS: &str = "Jobs and memory";
const OUTPUT: &str = "Control and output";
const SANDBOX: &str = "Sandbox";
const TESTS: &str = "Checks and fault injection";

/// A virtual GPU outside QEMU, attached over vhost-user, with an MMU that mirrors the guest's IOMMU.
///
/// It serves one front-end at a time, stays in the foreground, and exits on SIGTERM or SIGINT.
///
/// SIZE is a number with KiB, MiB or GiB (64MiB) or with the decimal k, M or G; DURATION is a number with us, ms, s or
/// min (100ms). Options marked "repeatable" may be given several times. The words used here (ack, drain, miss, pin, …)
/// are defined in the glossary of ARCHITECTURE.md.
#[derive(Clone, Debug, Parser)]
#[command(name = "mirrorgpu", version)]
#[command(
    override_usage = "mirrorgpu --socket-path <PATH> [OPTIONS]\n       mirrorgpu --fd <NUMBER> [OPTIONS]"
)]
pub struct Args {
    /// UNIX socket on which to listen for the front-end (QEMU).
    ///
    /// A socket file that a dead process has left is replaced. A socket that another process still uses is an error.
    #[arg(long, value_name = "PATH", conflicts_with = "fd", help_heading = CONNECTION)]
    socket_path: Option<PathBuf>,

    /// Inherited file descriptor to use instead of --socket-path: a UNIX stream socket, listening or connected.
    #[arg(long, value_name = "NUMBER", value_parser = value_parser!(RawFd).range(0..), help_heading = CONNECTION)]
    fd: Option<RawFd>,

    /// Exit when the first front-end has disconnected, instead of waiting for the next one.
    #[arg(long, help_heading = CONNECTION)]
    pub once: bool,

    /// Print the capabilities of this back-end as JSON (QEMU's vhost-user.json schema), and exit.
    #[arg(long, help_heading = CONNECTION)]
    pub print_capabilities: bool,

    /// Number of scanouts (screens), 1 to 16. QEMU's vhost-user-gpu replaces it by its own max_outputs.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = value_parser!(u32).range(1..=16))]
    #[arg(help_heading = DISPLAY)]
    pub scanouts: u32,

    /// Offer a 2D display only: no jobs, and no feature that only jobs need (VIRTIO_GPU_F_VIRGL, CONTEXT_INIT, blobs).
    ///
    /// For guests that only need a screen. Linux 7.3 refuses to hibernate while VIRGL is negotiated.
    #[arg(long, help_heading = DISPLAY)]
    pub no_jobs: bool,

    /// Number of engines, the threads that run jobs, 1 to 64 [default: number of processors minus 1, at least 1, at most 4].
    #[arg(long, value_name = "COUNT", default_value_t = default_engines() as u16, hide_default_value = true)]
    #[arg(value_parser = value_parser!(u16).range(1..=64), help_heading = JOBS)]
    engines: u16,

    /// Coherence mode of contexts that do not choose one: strict, fence, preempt, fault or registration-cache
    ///
    /// The mode decides what an invalidation waits for when a job uses its range:
    ///   strict              the step of the job that is running
    ///   fence               the whole job, up to --drain-timeout
    ///   preempt             the step; then the job is taken off its engine, and continues later
    ///   fault               the step; if the memory is gone when the job reaches it, the job ends with a fault record
    ///   registration-cache  nothing: the job goes on using the old memory (needs --allow-incoherent)
    #[arg(long, value_name = "MODE", default_value = "fence", value_parser = values::mode, help_heading = JOBS)]
    #[arg(verbatim_doc_comment)]
    pub default_mode: Mode,

    /// Offer the mode registration-cache, in which a job goes on using memory that the guest has unmapped.
    ///
    /// It is incoherent by definition, and only for drivers that never unmap memory in use. The pins that an
    /// invalidation did not wait for are counted (incoherent_pins).
    #[arg(long, help_heading = JOBS)]
    pub allow_incoherent: bool,

    /// How long an invalidation waits for the jobs that have pinned its range, before their pins are evicted (0s to 10min).
    ///
    /// The VM can stand still for as long, because QEMU waits for the ack. A job whose pin was evicted continues later.
    #[arg(long, value_name = "DURATION", default_value = "100ms", value_parser = values::drain_timeout)]
    #[arg(help_heading = JOBS)]
    pub drain_timeout: Duration,

    /// How long the front-end may take to answer a MISS, before the job that needs the translation fails (1ms to 10min).
    ///
    /// The timeout restarts, for up to a minute, while the front-end has not even read the MISS: then its process is
    /// stopped, or the host is overloaded.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = values::miss_timeout)]
    #[arg(help_heading = JOBS)]
    pub miss_timeout: Duration,

    /// Maximum memory for the page tables of the mirror, at least 64KiB.
    ///
    /// When it is used up, older translations are dropped, and requested again when a job needs them.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = values::iotlb_limit)]
    #[arg(help_heading = JOBS)]
    pub iotlb_limit: usize,

    /// When the TLB of an address space makes and drops entries: sticky, thrash, random:SEED or prefetch:PAGES
    ///
    ///   sticky          keeps each entry until the driver flushes it: a missing flush shows at the next use
    ///   thrash          keeps no entry: each step of a job reads the page tables
    ///   random:SEED     as sticky, but drops random entries too; the same SEED drops the same ones
    ///   prefetch:PAGES  as sticky, but also looks up the next PAGES pages (0 to 255)
    #[arg(long, value_name = "POLICY", default_value = "sticky", value_parser = values::tlb_policy, help_heading = JOBS)]
    #[arg(verbatim_doc_comment)]
    pub tlb: TlbPolicy,

    /// Limits of what the guest can make the process use.
    #[command(flatten)]
    pub quotas: QuotaArgs,

    /// UNIX socket for commands and events: JSON lines in the style of QEMU's QMP, described in backend/CONTROL.md.
    #[arg(long, value_name = "PATH", help_heading = OUTPUT)]
    pub control_socket: Option<PathBuf>,

    /// Existing folder to which a trace of the flight recorder is written at each violation and each hang.
    ///
    /// JSON for Perfetto and Chrome, at most 32 files in the life of the process. Without this option no trace is
    /// written automatically. The control command `record` writes one at any time: in the sandbox only to this folder.
    #[arg(long, value_name = "DIR", help_heading = OUTPUT)]
    pub record_dir: Option<PathBuf>,

    /// What the process gives up when it has started [default: strict, or as much of it as this system offers].
    ///
    ///   strict  each thread keeps only the system calls that it makes (seccomp), and no file can be opened except
    ///           traces in --record-dir (landlock)
    ///   basic   as strict, without the lists of system calls: for tracers, sanitizers and other C libraries
    ///   off     neither
    ///
    /// The process gains no privileges at any level. If this option is given and the system lacks a part of the level,
    /// the process does not start. Without it, the process starts and logs what is missing.
    #[arg(long, value_name = "LEVEL", help_heading = SANDBOX, verbatim_doc_comment)]
    pub sandbox: Option<Level>,

    /// Print all counters as one line of JSON on standard output at exit.
    ///
    /// They are also logged at exit, at level info, with or without this option.
    #[arg(long, help_heading = OUTPUT)]
    pub stats_at_exit: bool,

    /// Lowest severity that is logged on standard error [default: info].
    ///
    /// The environment variable RUST_LOG sets it too, for each module if wanted. This option takes precedence.
    #[arg(long, value_name = "LEVEL", help_heading = OUTPUT)]
    log_level: Option<LogLevel>,

    /// Checks the front-end.
    #[arg(long, help = front_end_check::SHORT_HELP, long_help = front_end_check::long_help())]
    #[arg(help_heading = TESTS)]
    pub check_front_end: bool,

    /// Seeded bugs to turn on.
    #[arg(long, value_name = "BUG", help = fault_injection::SHORT_HELP, long_help = fault_injection::long_help())]
    #[arg(value_parser = fault_injection::parse, help_heading = TESTS)]
    pub inject: Vec<Setting>,
}

/// Limits of what the guest can make the process use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Limits (a command of the guest that exceeds one is answered with an error)")]
pub struct QuotaArgs {
    /// Maximum memory for the pixels of all resources together.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = values::size)]
    pub max_resource_bytes: u64,

    /// Maximum number of memory entries (address and length) of all backings together.
    #[arg(long, value_name = "COUNT", default_value_t = 16_384, value_parser = value_parser!(u32).range(1..))]
    pub max_backing_entries: u32,

    /// Maximum number of resources.
    #[arg(long, value_name = "COUNT", default_value_t = 4096, value_parser = value_parser!(u32).range(1..))]
    pub max_resources: u32,

    /// Maximum number of contexts.
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = value_parser!(u32).range(1..))]
    pub max_contexts: u32,

    /// Maximum number of address spaces of all contexts together.
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = value_parser!(u32).range(1..))]
    pub max_address_spaces: u32,

    /// Maximum number of TLB entries of all address spaces together, one for each page of 4 KiB.
    ///
    /// It refuses no command: an older entry is dropped, or the new one is not kept.
    #[arg(long, value_name = "COUNT", default_value_t = 65_536, value_parser = value_parser!(u32).range(1..))]
    pub max_tlb_entries: u32,

    /// Maximum number of jobs that wait or run; and separately, of 2D commands that do.
    ///
    /// Each context has an equal share of the jobs reserved: this number divided by --max-contexts. The rest is shared.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = value_parser!(u32).range(1..))]
    pub max_queued_jobs: u32,

    /// Maximum number of file descriptors that the process has open, at least 32.
    ///
    /// It refuses no command of the guest: a message of the front-end that would exceed it loses its descriptors.
    #[arg(long, value_name = "COUNT", default_value_t = 256, value_parser = value_parser!(u32).range(32..))]
    pub max_descriptors: u32,
}

/// Where the front-end comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint<'a> {
    /// A socket to bind.
    Path(&'a Path),
    /// An inherited descriptor.
    Fd(RawFd),
}

/// Names of the severities on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Args {
    /// Reads the process's command line. Prints and exits for `--help` and `--version` (status 0), and with one line
    /// at errors (status 2).
    pub fn from_command_line() -> Self {
        Self::from_words(std::env::args_os()).unwrap_or_else(|error| {
            if !error.use_stderr() {
                error.exit();
            }
            eprintln!("mirrorgpu: {}; see mirrorgpu --help", one_line(&error));
            std::process::exit(2)
        })
    }

    /// Reads a command line whose first word is the program's name.
    pub fn from_words<W: Into<OsString> + Clone>(
        words: impl IntoIterator<Item = W>,
    ) -> Result<Self, clap::Error> {
        let args = Self::try_parse_from(words)?;
        if args.endpoint().is_none() && !args.print_capabilities {
            let what = "no socket for the front-end: give --socket-path PATH or --fd NUMBER";
            return Err(Self::command().error(ErrorKind::MissingRequiredArgument, what));
        }
        if args.default_mode == Mode::RegistrationCache && !args.allow_incoherent {
            let what = "--default-mode registration-cache is incoherent: it also needs --allow-incoherent";
            return Err(Self::command().error(ErrorKind::MissingRequiredArgument, what));
        }
        Ok(args)
    }

    /// Where the front-end comes from; `None` only with [`Args::print_capabilities`].
    pub fn endpoint(&self) -> Option<Endpoint<'_>> {
        match (&self.socket_path, self.fd) {
            (Some(path), _) => Some(Endpoint::Path(path)),
            (None, Some(fd)) => Some(Endpoint::Fd(fd)),
            (None, None) => None,
        }
    }

    /// Number of engine threads, at least 1.
    pub fn engines(&self) -> usize {
        usize::from(self.engines)
    }

    /// Starts the log on standard error. The flag wins over RUST_LOG, which wins over `info`. Once a process.
    pub fn start_log(&self) {
        let mut builder = env_logger::Builder::new();
        builder.filter_level(LevelFilter::Info).parse_default_env();
        if let Some(level) = self.log_level {
            builder = env_logger::Builder::new();
            builder.filter_level(level.into());
        }
        builder.init();
    }
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::Off,
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

/// What is wrong, without clap's paragraphs around it.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string().replace("\n\n  tip:", "; tip:");
    let said = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let words: Vec<&str> = said.flat_map(str::split_whitespace).collect();
    let line = words.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

fn default_engines() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.saturating_sub(1).clamp(1, DEFAULT_ENGINES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault_injection::{Bug, Value};

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::from_words(std::iter::once("mirrorgpu").chain(line.split_whitespace()))
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let args = parse("--socket-path /run/gpu.sock").unwrap();
        assert_eq!(args.endpoint(), Some(Endpoint::Path(Path::new("/run/gpu.sock"))));
        assert_eq!(args.drain_timeout, Duration::from_millis(100));
        assert_eq!(args.miss_timeout, Duration::from_secs(1));
        assert_eq!(args.iotlb_limit, 64 << 20);
        assert_eq!((args.default_mode, args.allow_incoherent), (Mode::Fence, false));
        assert!((1..=4).contains(&args.engines()));
        let quotas = QuotaArgs {
            max_resource_bytes: 256 << 20,
            max_backing_entries: 16_384,
            max_resources: 4096,
            max_contexts: 64,
            max_address_spaces: 64,
            max_tlb_entries: 65_536,
            max_queued_jobs: 1024,
            max_descriptors: 256,
        };
        assert_eq!(args.quotas, quotas);
        assert!(!args.once && !args.stats_at_exit && !args.print_capabilities && !args.check_front_end);
        assert!(args.inject.is_empty() && args.control_socket.is_none() && args.log_level.is_none());
    }

    #[test]
    fn exactly_one_endpoint_is_wanted_and_none_for_the_capabilities() {
        assert_eq!(parse("").unwrap_err().kind(), ErrorKind::MissingRequiredArgument);
        let both = parse("--socket-path /a --fd 3").unwrap_err();
        assert_eq!(both.kind(), ErrorKind::ArgumentConflict);
        assert_eq!(parse("--fd 3").unwrap().endpoint(), Some(Endpoint::Fd(3)));
        assert_eq!(parse("--fd=-1").unwrap_err().kind(), ErrorKind::ValueValidation);
        let capabilities = parse("--print-capabilities").unwrap();
        assert!(capabilities.print_capabilities);
        assert_eq!(capabilities.endpoint(), None);
        assert!(parse("--print-capabilities --socket-path /a").unwrap().print_capabilities);
    }

    #[test]
    fn durations_and_sizes_take_units_and_nothing_without_sense() {
        let args = parse("--fd 3 --drain-timeout 0ms --miss-timeout 2s500ms --iotlb-limit 2GiB").unwrap();
        assert_eq!(args.drain_timeout, Duration::ZERO);
        assert_eq!(args.miss_timeout, Duration::from_millis(2500));
        assert_eq!(args.iotlb_limit, 2 << 30);
        for (bad, explanation) in [
            ("--drain-timeout 100", "such as 100ms"),
            ("--drain-timeout soon", "such as 100ms"),
            ("--drain-timeout 11min", "must be from 0s to 10m"),
            ("--miss-timeout 0s", "must be from 1ms to 10m"),
            ("--iotlb-limit 1KiB", "must be at least 64KiB"),
            ("--iotlb-limit lots", "such as 64MiB"),
            ("--iotlb-limit 99999999999999GiB", "such as 64MiB"),
            ("--max-resource-bytes 0", "must not be 0"),
            ("--max-contexts 0", "0 is not in 1.."),
            ("--engines 0", "0 is not in 1..=64"),
            ("--inject nonsense", "ack-before-drain"),
        ] {
            let error = parse(&format!("--fd 3 {bad}")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ValueValidation, "{bad}");
            let text = error.to_string();
            assert!(text.contains(explanation), "{bad}: {text}");
        }
    }

    #[test]
    fn incoherence_has_to_be_asked_for_by_name() {
        let error = parse("--fd 3 --default-mode registration-cache").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
        let args = parse("--fd 3 --default-mode registration-cache --allow-incoherent").unwrap();
        assert_eq!(args.default_mode, Mode::RegistrationCache);
        assert_eq!(parse("--fd 3 --default-mode fault").unwrap().default_mode, Mode::Fault);
        let unknown = parse("--fd 3 --default-mode lazy").unwrap_err().to_string();
        assert!(
            unknown.contains("the modes are strict, fence, preempt, fault, registration-cache"),
            "{unknown}"
        );
    }

    #[test]
    fn an_error_is_one_line() {
        for (line, expected) in [
            ("", "no socket for the front-end: give --socket-path PATH or --fd NUMBER"),
            (
                "--sock /a",
                "unexpected argument '--sock' found; tip: a similar argument exists: '--socket-path'",
            ),
            (
                "--fd 3 --miss-timeout 1",
                "invalid value '1' for '--miss-timeout <DURATION>': time unit needed, for example 1sec or 1ms; \
                 write a number with a unit, such as 100ms or 1s",
            ),
        ] {
            assert_eq!(one_line(&parse(line).unwrap_err()), expected);
        }
    }

    #[test]
    fn bugs_can_be_given_several_times() {
        let args = parse("--fd 3 --inject ack-before-drain --inject step-delay=2ms").unwrap();
        let delay = Value::Fixed(Duration::from_millis(2));
        let settings = [(Bug::AckBeforeDrain, Value::Plain), (Bug::StepDelay, delay)];
        assert_eq!(args.inject, settings.map(|(bug, value)| Setting { bug, value }));
    }

    #[test]
    fn the_help_explains_every_flag_under_a_heading() {
        Args::command().debug_assert();
        let help = Args::command().render_long_help().to_string();
        for argument in Args::command().get_arguments() {
            let explained = argument.get_help().is_some_and(|help| !help.to_string().is_empty());
            assert!(explained, "{} is not explained", argument.get_id());
            assert!(argument.get_help_heading().is_some(), "{} has no heading", argument.get_id());
            let flag = format!("--{}", argument.get_id().to_string().replace('_', "-"));
            assert!(help.contains(&flag), "{flag} is missing:\n{help}");
        }
    }
}
