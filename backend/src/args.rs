//! The command line: every flag with its unit, its default and its bounds. Knows text only; opens nothing.

use std::ffi::OsString;
use std::num::ParseIntError;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum, value_parser};
use device_model::jobs::address_space::TlbPolicy;
use job_stream::{Choice, Mode};
use log::LevelFilter;

use crate::fault_injection::{self, Setting};
use crate::front_end_check;
use crate::units::duration;

/// Most engine threads that are started unless more are asked for.
const DEFAULT_ENGINES: usize = 4;
/// Longest timeout that is accepted: a VM may stand still for as long.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(600);
/// Fewest bytes of page tables with which the device can work.
const LEAST_IOTLB: u64 = 64 << 10;

/// A virtual GPU outside QEMU, attached over vhost-user, with an MMU that mirrors the guest's IOMMU.
///
/// It serves one front-end at a time, stays in the foreground, and ends at SIGTERM or SIGINT. Sizes take KiB, MiB or
/// GiB (64MiB) or the decimal k, M, G; durations take us, ms, s or min (100ms).
#[derive(Clone, Debug, Parser)]
#[command(name = "mirrorgpu", version)]
#[command(
    override_usage = "mirrorgpu --socket-path <PATH> [OPTIONS]\n       mirrorgpu --fd <NUMBER> [OPTIONS]"
)]
pub struct Args {
    /// UNIX socket to listen on for the front-end, QEMU.
    ///
    /// A socket that a dead process has left there is replaced; one that is in use is an error.
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,

    /// Inherited file descriptor to use instead: a UNIX stream socket, listening or connected.
    #[arg(long, value_name = "NUMBER", value_parser = value_parser!(RawFd).range(0..))]
    fd: Option<RawFd>,

    /// Print what this back-end can do as JSON (QEMU's vhost-user.json schema), and exit.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Exit when the first front-end is gone, instead of waiting for the next.
    #[arg(long)]
    pub once: bool,

    /// How long an invalidation waits for the jobs that use its range, before they are pushed off the engines.
    ///
    /// The VM stands still for as long.
    #[arg(long, value_name = "DURATION", default_value = "100ms", value_parser = drain_timeout)]
    pub drain_timeout: Duration,

    /// How long a translation that was asked for may take, before the job that needs it fails.
    ///
    /// It begins anew, for up to a minute, while the front-end has not even read what it was asked: then it stands still.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = miss_timeout)]
    pub miss_timeout: Duration,

    /// Most memory for the page tables of the mirror; older translations are forgotten beyond it.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = iotlb_limit)]
    pub iotlb_limit: usize,

    /// Threads that run jobs. By default one less than there are processors, at least 1, at most 4.
    #[arg(long, value_name = "COUNT", default_value_t = default_engines() as u16, hide_default_value = true)]
    #[arg(value_parser = value_parser!(u16).range(1..=64))]
    engines: u16,

    /// Scanouts that the configuration space announces. QEMU's vhost-user-gpu writes its own max_outputs over it.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = value_parser!(u32).range(1..=16))]
    pub scanouts: u32,

    /// Be a 2D display only: offer neither jobs nor anything that they need (VIRTIO_GPU_F_VIRGL, CONTEXT_INIT, blobs).
    ///
    /// For guests that only need a screen. Linux 7.3 refuses to hibernate while VIRGL is negotiated.
    #[arg(long)]
    pub no_jobs: bool,

    /// How an invalidation meets the jobs of a context that does not say: strict, fence, preempt, fault or
    /// registration-cache.
    #[arg(long, value_name = "MODE", default_value = "fence", value_parser = mode)]
    pub default_mode: Mode,

    /// How the TLB of a device address space behaves: sticky, thrash, random:SEED or prefetch:PAGES.
    ///
    /// sticky keeps each entry until the driver flushes it, so that a missing flush shows at the next use. thrash keeps
    /// nothing. random drops entries without being told. prefetch also looks up the pages behind the one in use.
    #[arg(long, value_name = "POLICY", default_value = "sticky", value_parser = tlb_policy)]
    pub tlb: TlbPolicy,

    /// Offer the mode registration-cache, in which jobs go on with memory that the guest has taken away.
    ///
    /// Incoherent by definition: only for drivers that never unmap what is in use. What it lets through is counted.
    #[arg(long)]
    pub allow_incoherent: bool,

    /// UNIX socket on which tools may ask: JSON lines in the manner of QEMU's QMP.
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Existing folder into which a trace is written at each violation and at each hang.
    ///
    /// Chrome and Perfetto JSON, at most 32 files a process. Without it, none are written by themselves; the control
    /// command `record` writes one at any time.
    #[arg(long, value_name = "DIR")]
    pub record_dir: Option<PathBuf>,

    /// Print all counters as one line of JSON on standard output at exit.
    ///
    /// They are logged at exit in any case, at level info.
    #[arg(long)]
    pub stats_at_exit: bool,

    /// Least severity that is logged on standard error [default: info].
    ///
    /// The environment variable RUST_LOG does the same, per module if wanted; the flag wins.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<LogLevel>,

    /// Judge the front-end.
    #[arg(long, help = front_end_check::SHORT_HELP, long_help = front_end_check::long_help())]
    pub check_front_end: bool,

    /// Seeded bugs to turn on.
    #[arg(long, value_name = "BUG", help = fault_injection::SHORT_HELP, long_help = fault_injection::long_help())]
    #[arg(value_parser = fault_injection::parse)]
    pub inject: Vec<Setting>,

    /// What a guest may take.
    #[command(flatten)]
    pub quotas: QuotaArgs,
}

/// What a guest may take. Beyond it, its commands are answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Quotas of the guest")]
pub struct QuotaArgs {
    /// Most memory for the pixels of all resources.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    pub max_resource_bytes: u64,

    /// Most memory entries of all backings together.
    #[arg(long, value_name = "COUNT", default_value_t = 16_384, value_parser = value_parser!(u32).range(1..))]
    pub max_backing_entries: u32,

    /// Most resources.
    #[arg(long, value_name = "COUNT", default_value_t = 4096, value_parser = value_parser!(u32).range(1..))]
    pub max_resources: u32,

    /// Most contexts.
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = value_parser!(u32).range(1..))]
    pub max_contexts: u32,

    /// Most device address spaces of all contexts.
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = value_parser!(u32).range(1..))]
    pub max_address_spaces: u32,

    /// Most TLB entries of all address spaces, one for each page of 4 KiB.
    #[arg(long, value_name = "COUNT", default_value_t = 65_536, value_parser = value_parser!(u32).range(1..))]
    pub max_tlb_entries: u32,

    /// Most jobs that wait or run.
    ///
    /// Each context has an equal share of them to itself, this number divided by --max-contexts; the rest is for all.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = value_parser!(u32).range(1..))]
    pub max_queued_jobs: u32,

    /// Most file descriptors that the process has open, whatever guest or front-end do.
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
            let what = "where does the front-end connect? Give --socket-path PATH or --fd NUMBER";
            return Err(Self::command().error(ErrorKind::MissingRequiredArgument, what));
        }
        if args.default_mode == Mode::RegistrationCache && !args.allow_incoherent {
            let what = "the mode registration-cache is incoherent: give --allow-incoherent too";
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
    let text = error.to_string();
    let said = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let words: Vec<&str> = said.flat_map(str::split_whitespace).collect();
    let line = words.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

fn default_engines() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.saturating_sub(1).clamp(1, DEFAULT_ENGINES)
}

fn drain_timeout(text: &str) -> Result<Duration, String> {
    timeout(text, Duration::ZERO)
}

fn miss_timeout(text: &str) -> Result<Duration, String> {
    timeout(text, Duration::from_millis(1))
}

fn timeout(text: &str, least: Duration) -> Result<Duration, String> {
    let duration = duration(text)?;
    if duration < least || duration > LONGEST_TIMEOUT {
        return Err(format!("must be from {least:?} to {LONGEST_TIMEOUT:?}"));
    }
    Ok(duration)
}

/// A policy of the TLB.
fn tlb_policy(text: &str) -> Result<TlbPolicy, String> {
    let (name, number) = text.split_once(':').map_or((text, None), |(name, number)| (name, Some(number)));
    let wrong = |number: &str| format!("'{number}' is not a number that {name} can have");
    match (name, number) {
        ("sticky", None) => Ok(TlbPolicy::Sticky),
        ("thrash", None) => Ok(TlbPolicy::Thrash),
        ("random", Some(seed)) => {
            Ok(TlbPolicy::Random { seed: seed.parse().map_err(|_: ParseIntError| wrong(seed))? })
        }
        ("prefetch", Some(pages)) => {
            Ok(TlbPolicy::Prefetch { pages: pages.parse().map_err(|_: ParseIntError| wrong(pages))? })
        }
        _ => Err("it is sticky, thrash, random:SEED or prefetch:PAGES (up to 255)".to_owned()),
    }
}

fn mode(text: &str) -> Result<Mode, String> {
    Mode::from_name(text).ok_or_else(|| {
        let known: Vec<_> = Mode::ALL.iter().map(|mode| mode.name()).collect();
        format!("there is no such mode; there are {}", known.join(", "))
    })
}

fn size(text: &str) -> Result<u64, String> {
    let size = parse_size::parse_size(text)
        .map_err(|error| format!("{error}; write a number with a unit, such as 64MiB"))?;
    if size == 0 { Err("must not be 0".to_owned()) } else { Ok(size) }
}

fn iotlb_limit(text: &str) -> Result<usize, String> {
    let bytes = size(text)?;
    if bytes < LEAST_IOTLB {
        return Err(format!("must be at least {}KiB", LEAST_IOTLB >> 10));
    }
    usize::try_from(bytes).map_err(|_| format!("{bytes} bytes are more than this machine can address"))
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
            ("--drain-timeout 11min", "must be from 0ns to 600s"),
            ("--miss-timeout 0s", "must be from 1ms to 600s"),
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
        assert!(unknown.contains("there are strict, fence, preempt, fault, registration-cache"), "{unknown}");
    }

    #[test]
    fn an_error_is_one_line() {
        for (line, expected) in [
            ("", "where does the front-end connect? Give --socket-path PATH or --fd NUMBER"),
            (
                "--sock /a",
                "unexpected argument '--sock' found tip: a similar argument exists: '--socket-path'",
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
    fn the_help_explains_every_flag() {
        Args::command().debug_assert();
        let help = Args::command().render_long_help().to_string();
        for argument in Args::command().get_arguments() {
            let explained = argument.get_help().is_some_and(|help| !help.to_string().is_empty());
            assert!(explained, "{} is not explained", argument.get_id());
            let flag = format!("--{}", argument.get_id().to_string().replace('_', "-"));
            assert!(help.contains(&flag), "{flag} is missing:\n{help}");
        }
    }
}
