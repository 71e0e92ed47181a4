//! The evidence after a failed run: the ends of the logs, a whole oops, and what the back-end reports about its
//! current work. Knows where to look; knows nothing of what was expected.

use crate::rig::backend_process::Backend;
use crate::rig::console::{self, Forgiven};
use crate::rig::disk;
use crate::rig::error::RigError;
use crate::rig::qemu::RunFiles;
use serde_json::{Value, json};
use std::path::Path;

const LINES: usize = 25;
/// Which queries are sent to the back-end, and how much of an answer is shown.
const QUESTIONS: [&str; 3] = ["stats", "jobs", "contexts"];
const ANSWER_CHARACTERS: usize = 4_000;

/// Adds to an error what the back-end says, and the logs. What cannot be shown needs no evidence.
pub(super) fn of_run(
    error: RigError,
    files: &RunFiles,
    forgiven: &Forgiven,
    backend: Option<&mut Backend>,
) -> RigError {
    if matches!(error, RigError::Skip(_)) {
        return error;
    }
    let mut text = logs(files, forgiven);
    let error = behind(files, error, &mut text);
    if let Some(backend) = backend {
        for question in QUESTIONS {
            let answer = match backend.control(question, json!({})) {
                Ok(answer) => answer.unwrap_or_default().to_string(),
                Err(error) => format!("nothing: {error}"),
            };
            let shown: String = answer.chars().take(ANSWER_CHARACTERS).collect();
            text.push_str(&format!("\n--- The back-end's `{question}`: {shown}"));
        }
        text.push_str(&trace(backend, &files.folder.join("trace.json")));
    }
    error.with_evidence(text)
}

/// Adds the logs to an error.
pub(super) fn of_logs(error: RigError, files: &RunFiles) -> RigError {
    let mut text = logs(files, &Forgiven::default());
    behind(files, error, &mut text).with_evidence(text)
}

/// The cause of an error, if it is known: a full disk, or a dead guest. The original error becomes evidence.
fn behind(files: &RunFiles, error: RigError, text: &mut String) -> RigError {
    let is_silence =
        matches!(error, RigError::Late { .. } | RigError::Closed { .. } | RigError::Ended { .. });
    let log = RunFiles::text(&files.console());
    let cause = match (disk::has_room(&files.folder), console::panic(&log)) {
        (Err(full), _) => full,
        (Ok(()), Some(words)) if is_silence => RigError::Panic(words),
        _ => return error,
    };
    text.insert_str(0, &format!("\n--- What came of it: {error}"));
    cause
}

fn logs(files: &RunFiles, forgiven: &Forgiven) -> String {
    let logs = [
        ("The guest's console", files.console()),
        ("QEMU's output", files.qemu_output()),
        ("The back-end's log", files.backend_log()),
    ];
    let mut text = String::new();
    if let Some(oops) = forgiven.oops(&RunFiles::text(&files.console())) {
        text.push_str(&format!("\n--- The guest's kernel was in trouble:\n{oops}"));
    }
    for (name, path) in logs {
        let log = RunFiles::text(&path);
        if log.trim().is_empty() {
            text.push_str(&format!("\n--- {name} is empty"));
        } else {
            text.push_str(&format!("\n--- {name} ends with:\n{}", console::end(&log, LINES)));
        }
    }
    text
}

/// Writes the flight recorder's events, and returns the path.
fn trace(backend: &mut Backend, path: &Path) -> String {
    let written = backend.control("record", json!({ "path": path }));
    let events = written.ok().flatten().and_then(|answer| answer.get("events").and_then(Value::as_u64));
    match events {
        Some(events) => {
            format!("\n--- The last {events} events of the device: {} (if --keep is given)", path.display())
        }
        None => "\n--- The back-end gave no trace".to_owned(),
    }
}
