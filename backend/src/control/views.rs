//! Handlers that show the state of the device. They query its threads through the query channel, with bounded answers,
//! and hold no lock that those threads wait for.

use std::collections::BTreeMap;

use device_model::gpu::context::{ContextInfo, RingInfo};
use device_model::jobs::job::JobId;
use device_model::jobs::schedule::{AtRest, JobState, JobStatus};
use device_model::mmu::MappedRange;
use device_model::telemetry::violation::{Fault, Report};
use job_stream::Choice;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Hooks;
use super::commands::{Failure, NoArguments};
use crate::front_end_check::{self, Kept};
use crate::session::queries::audit_json;
use crate::telemetry::instruments::query_channel::Question;
use crate::telemetry::instruments::{HOW_TO_TRACE, OnEngine};
use crate::telemetry::reports::{Reported, fault_json, violation_json};
use device_model::session::miss_port::Waiter;

/// Maximum number of misses that `jobs` reads to find the pages that a job waits for.
const MISSES: usize = 1024;

pub(super) fn contexts(hooks: &Hooks, _: NoArguments) -> Result<Value, Failure> {
    let contexts = hooks.instruments.query_channel.contexts()?;
    Ok(json!({ "contexts": contexts.iter().map(context).collect::<Vec<_>>() }))
}

fn context(info: &ContextInfo) -> Value {
    json!({
        "context": info.context,
        "mode": info.mode.map(Choice::name),
        "priority": info.priority.name(),
        "lost": info.lost,
        "attached": info.attached,
        "rings": info.rings.iter().map(ring).collect::<Vec<_>>(),
    })
}

fn ring(info: &RingInfo) -> Value {
    json!({ "ring": info.ring, "running": info.running, "waiting": info.waiting })
}

/// All jobs of the engines and the scheduler. Jobs that wait behind them in the queues of their contexts have no number
/// yet; their count is given by context.
pub(super) fn jobs(hooks: &Hooks, _: NoArguments) -> Result<Value, Failure> {
    let instruments = &hooks.instruments;
    let statuses = instruments.query_channel.connection()?.scheduler.jobs();
    let running = instruments.running();
    let mut misses: BTreeMap<JobId, Vec<Value>> = BTreeMap::new();
    for (page, waiters) in instruments.query_channel.ask(|answer| Question::Misses(MISSES, answer))? {
        for waiter in waiters {
            if let Waiter::Job(wait) = waiter {
                misses
                    .entry(wait.job)
                    .or_default()
                    .push(json!({"page": page.iova.to_string(), "access": page.access}));
            }
        }
    }
    let jobs = statuses.iter().map(|status| {
        let engine = running.iter().find(|running| running.job == status.id);
        job(hooks, status, engine, misses.remove(&status.id).unwrap_or_default())
    });
    let jobs: Vec<_> = jobs.collect();
    let queued = instruments.query_channel.contexts()?;
    let rings = queued.iter().flat_map(|info| info.rings.iter().map(|ring| (info.context, ring)));
    let queued = rings.filter(|(_, ring)| ring.waiting > 0);
    let queued: Vec<_> = queued
        .map(|(context, ring)| json!({"context": context, "ring": ring.ring, "waiting": ring.waiting}))
        .collect();
    Ok(json!({ "jobs": jobs, "queued": queued }))
}

fn job(hooks: &Hooks, status: &JobStatus, engine: Option<&OnEngine>, misses: Vec<Value>) -> Value {
    let name = hooks.instruments.names().job(status.id).cloned();
    let at_rest = status.at_rest.as_ref();
    let state = match status.state {
        JobState::Ready => "ready",
        JobState::Running => "running",
        JobState::Misses(_) => "missing",
        JobState::Checks(_) => "validating",
        JobState::Invalidation => "invalidation",
        JobState::Value(_) => "waiting",
        JobState::Fault => "faulted",
    };
    let packet = engine.and_then(|engine| engine.packet);
    let at_rest_packet = |at_rest: &AtRest| at_rest.packet.map(|packet| packet as u64);
    json!({
        "job": status.id,
        "context": name.as_ref().and_then(|name| name.context),
        "mode": name.as_ref().map(|name| name.mode.name()),
        "priority": name.as_ref().map(|name| name.priority.name()),
        "state": state,
        "engine": engine.map(|engine| engine.engine),
        "packet": packet.or(at_rest.and_then(at_rest_packet)),
        "bytes": engine.map(|engine| engine.bytes).or(at_rest.map(|at_rest| at_rest.bytes)),
        "misses": misses,
    })
}

/// Arguments of `iotlb`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IotlbArguments {
    /// Maximum number of ranges in the answer.
    #[serde(default = "some_ranges")]
    limit: u16,
}

fn some_ranges() -> u16 {
    1024
}

/// Upper limit of that maximum.
const MOST_RANGES: usize = 4096;

pub(super) fn iotlb(hooks: &Hooks, arguments: IotlbArguments) -> Result<Value, Failure> {
    let most = usize::from(arguments.limit).min(MOST_RANGES);
    let list = hooks.instruments.query_channel.ask(|answer| Question::Iotlb(most, answer))?;
    let ranges: Vec<_> = list.ranges.iter().map(mapped).collect();
    Ok(json!({ "ranges": ranges, "truncated": list.truncated }))
}

fn mapped(mapped: &MappedRange) -> Value {
    let MappedRange { range, permissions, .. } = mapped;
    json!({ "range": range, "read": permissions.read, "write": permissions.write })
}

pub(super) fn faults(hooks: &Hooks, _: NoArguments) -> Result<Value, Failure> {
    let faults = hooks.instruments.reports.faults();
    // The names are looked up one by one, because holding their lock for long would delay the rings.
    let json = |fault: &Fault| fault_json(fault, &hooks.instruments.names_of(fault));
    let records: Vec<_> = faults.records.iter().map(json).collect();
    Ok(json!({ "faults": records, "dropped": faults.dropped }))
}

pub(super) fn violations(hooks: &Hooks, _: NoArguments) -> Result<Value, Failure> {
    let violations = hooks.instruments.reports.violations();
    let records: Vec<_> = violations.records.iter().map(|reported| reported_json(hooks, reported)).collect();
    Ok(json!({ "violations": records, "dropped": violations.dropped }))
}

/// The findings about the front-end, if it is checked.
pub(super) fn findings(hooks: &Hooks, _: NoArguments) -> Result<Value, Failure> {
    let findings = &hooks.instruments.front_end;
    let newest = findings.newest();
    let records: Vec<_> = newest.records.iter().map(|kept| kept_json(hooks, kept)).collect();
    let counts: Map<String, Value> =
        findings.counts().iter().map(|(rule, count)| (rule.row().name.to_owned(), (*count).into())).collect();
    Ok(json!({
        "checking": findings.is_on(),
        "findings": records,
        "dropped": newest.dropped,
        "counts": counts,
    }))
}

fn kept_json(hooks: &Hooks, kept: &Kept) -> Value {
    let Kept { finding, names, trace } = kept;
    // The reporter may not have looked the names up yet.
    let look_up = || finding.range.map(|range| hooks.instruments.names().of(finding.at, range));
    let late = if names.is_none() { look_up() } else { None };
    let names = names.as_ref().or(late.as_ref()).map_or(&[][..], Vec::as_slice);
    let trace = if trace.is_empty() { HOW_TO_TRACE } else { trace };
    let mut value = finding.json();
    if let Some(object) = value.as_object_mut() {
        let report = front_end_check::Report { finding, names, trace };
        object.insert("report".to_owned(), report.to_string().into());
    }
    value
}

fn reported_json(hooks: &Hooks, reported: &Reported) -> Value {
    let Reported { violation, names, trace } = reported;
    // The reporter may not have looked the names up yet.
    let late = names.is_none().then(|| hooks.instruments.names().of(violation.at, violation.range));
    let names = names.as_ref().or(late.as_ref()).map_or(&[][..], Vec::as_slice);
    let trace = if trace.is_empty() { HOW_TO_TRACE } else { trace };
    let mut value = violation_json(violation);
    if let Some(object) = value.as_object_mut() {
        object.insert("report".to_owned(), Report { violation, names, trace }.to_string().into());
    }
    value
}

/// Arguments of `audit`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuditArguments {
    /// Start a new audit even if there was one.
    #[serde(default)]
    restart: bool,
}

/// Starts an audit if there was none, or returns its progress or its result.
pub(super) fn audit(hooks: &Hooks, arguments: AuditArguments) -> Result<Value, Failure> {
    let query_channel = &hooks.instruments.query_channel;
    let begin = {
        let news = query_channel.audit();
        !news.running && (arguments.restart || news.report.is_none())
    };
    if begin {
        query_channel.ask(Question::Audit)?;
    }
    let news = query_channel.audit().clone();
    let mut value = audit_json(&news.report.unwrap_or_default());
    if let Some(object) = value.as_object_mut() {
        object.insert("state".to_owned(), if news.running { "running" } else { "done" }.into());
    }
    Ok(value)
}

/// Arguments of `record`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecordArguments {
    path: std::path::PathBuf,
}

/// Writes the flight recorder's content as a trace.
pub(super) fn record(hooks: &Hooks, arguments: RecordArguments) -> Result<Value, Failure> {
    let path = arguments.path;
    match hooks.instruments.write_trace(&path) {
        Ok(events) => Ok(json!({ "path": path, "events": events })),
        Err(source) => Err(Failure::Trace { path, source }),
    }
}
