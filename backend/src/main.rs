//! The MirrorGPU back-end.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use device_model::gpu::device::{DeviceConfig, JobConfig};
use device_model::gpu::quota::Quotas;
use device_model::telemetry::stats::Stats;
use mirrorgpu::args::{Args, Endpoint};
use mirrorgpu::capabilities::CAPABILITIES;
use mirrorgpu::control::{ControlServer, Hooks};
use mirrorgpu::fault_injection::Injection;
use mirrorgpu::front_end_check::{Findings, Severity};
use mirrorgpu::limits;
use mirrorgpu::listener::{Inherited, PathListener};
use mirrorgpu::record_dir::RecordDir;
use mirrorgpu::sandbox::{self, Needs};
use mirrorgpu::server::{Server, Source};
use mirrorgpu::session::start::DeviceSettings;
use mirrorgpu::signals::StopSignals;
use mirrorgpu::telemetry::instruments::Instruments;
use mirrorgpu::threads::pool;
use mirrorgpu::vhost_user::memory::sigbus;
use mirrorgpu::wake::Wakers;

/// Exit codes of `--check-front-end`; a wrong command line also exits with the second.
const FRONT_END_AT_FAULT: u8 = 1;
const COULD_NOT_JUDGE: u8 = 2;

/// The result of a process that did its work.
enum Verdict {
    Clean,
    FrontEndAtFault,
}

fn main() -> ExitCode {
    let args = Args::from_command_line();
    if args.print_capabilities {
        println!("{}", CAPABILITIES.json());
        return ExitCode::SUCCESS;
    }
    let code = match run(&args) {
        Ok(Verdict::Clean) => 0,
        Ok(Verdict::FrontEndAtFault) => FRONT_END_AT_FAULT,
        Err(e) => {
            eprintln!("mirrorgpu: {}", mirrorgpu::error::chain(e.as_ref()));
            // With the flag, 1 means a finding about the front-end.
            if args.check_front_end { COULD_NOT_JUDGE } else { 1 }
        }
    };
    // A write that fails has no one left to be told of it.
    let _ = std::io::stdout().flush();
    // SAFETY: ends the process at once. What the standard library would do at a return from here is not in the sandbox;
    // `run` has dropped all that it used.
    unsafe { libc::_exit(code.into()) }
}

fn run(args: &Args) -> Result<Verdict, Box<dyn std::error::Error>> {
    let source = match args.endpoint() {
        Some(Endpoint::Path(path)) => Source::bind(path)?,
        // SAFETY: called once, before this process opens anything: nothing else owns the number.
        Some(Endpoint::Fd(fd)) => unsafe { Inherited::adopt(fd) }?.into(),
        None => return Err("Give --socket-path or --fd".into()),
    };
    args.start_log();
    limits::limit_descriptors(args.quotas.max_descriptors)?;
    // Both before any thread is started, so that they hold for all threads.
    limits::gain_no_privileges()?;
    let signals = StopSignals::block()?;
    sigbus::install()?;
    let stats = Arc::new(Stats::default());
    let injection = Arc::new(Injection::new(&args.inject));
    let control = args.control_socket.as_deref().map(PathListener::bind).transpose()?;
    let record = args.record_dir.as_deref().map(RecordDir::open).transpose()?;
    let sockets = source.path_listener().into_iter().chain(&control).collect();
    sandbox::prepare(args.sandbox, &Needs { sockets, record: record.as_ref() })?;
    pool::start(args.engines())?;
    let instruments = Instruments::start(args.engines(), record, Arc::clone(&stats))?;
    if args.check_front_end {
        instruments.front_end.turn_on();
    }
    let hooks = Hooks {
        stats: Arc::clone(&stats),
        instruments: Arc::clone(&instruments),
        injection: Arc::clone(&injection),
        stop: Box::new(StopSignals::request_stop),
    };
    let control = control.map(|listener| ControlServer::start(listener, hooks)).transpose()?;
    let server = Server {
        device: device_settings(args, &injection),
        stats: Arc::clone(&stats),
        instruments: Arc::clone(&instruments),
        signals,
        wakers: Wakers::new()?,
        once: args.once,
        check_front_end: args.check_front_end,
    };
    sandbox::enter_last(args.quotas.max_descriptors)?;
    let result = server.run(source);
    instruments.flush();
    drop(control);
    let counted = serde_json::to_string(&stats.snapshot())?;
    log::info!("Counted: {counted}");
    if args.stats_at_exit {
        println!("{counted}");
    }
    result?;
    Ok(if args.check_front_end { verdict(&instruments.front_end) } else { Verdict::Clean })
}

/// Prints the number of findings, and returns the result.
fn verdict(findings: &Findings) -> Verdict {
    let [certain, likely, notes] = Severity::ALL.map(|severity| findings.of(severity));
    eprintln!("mirrorgpu: findings about the front-end: {certain} certain, {likely} likely; notes: {notes}");
    if findings.accuse() { Verdict::FrontEndAtFault } else { Verdict::Clean }
}

fn device_settings(args: &Args, injection: &Arc<Injection>) -> DeviceSettings {
    DeviceSettings {
        device: DeviceConfig {
            quotas: Quotas {
                resource_bytes: args.quotas.max_resource_bytes,
                backing_entries: args.quotas.max_backing_entries.into(),
                resources: args.quotas.max_resources.into(),
                contexts: args.quotas.max_contexts.into(),
                address_spaces: args.quotas.max_address_spaces.into(),
                tlb_entries: args.quotas.max_tlb_entries.into(),
                queued_jobs: args.quotas.max_queued_jobs.into(),
            },
            announced_scanouts: args.scanouts,
            jobs: JobConfig {
                offered: !args.no_jobs,
                default_mode: args.default_mode,
                allow_incoherent: args.allow_incoherent,
                engines: u32::try_from(args.engines()).unwrap_or(u32::MAX),
                tlb: args.tlb,
            },
            ..DeviceConfig::default()
        },
        engines: args.engines(),
        iotlb_limit: args.iotlb_limit,
        drain_timeout: args.drain_timeout,
        miss_timeout: args.miss_timeout,
        injection: Arc::clone(injection),
    }
}
