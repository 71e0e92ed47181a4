//! The commands of the control socket. A command is one row of [`COMMANDS`] and one handler, with the type of its
//! arguments. Knows JSON text; knows nothing of sockets.

use std::io;
use std::path::PathBuf;

use log::warn;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{Hooks, views};
use crate::telemetry::instruments::query_channel::NoAnswer;

/// A row of the table of commands.
struct ControlCommand {
    name: &'static str,
    run: fn(&Hooks, Arguments) -> Result<Value, Refusal>,
}

/// The arguments of a command, unparsed.
struct Arguments {
    command: &'static str,
    map: Map<String, Value>,
}

impl Arguments {
    /// Calls a handler with arguments parsed to its type.
    fn of<A: DeserializeOwned>(
        self,
        hooks: &Hooks,
        handler: fn(&Hooks, A) -> Result<Value, Failure>,
    ) -> Result<Value, Refusal> {
        let command = self.command;
        let arguments = serde_json::from_value(Value::Object(self.map))
            .map_err(|source| Refusal::Arguments { command, source })?;
        handler(hooks, arguments).map_err(Refusal::Failed)
    }
}

/// For commands without arguments.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoArguments {}

const COMMANDS: &[ControlCommand] = &[
    ControlCommand { name: "audit", run: |hooks, arguments| arguments.of(hooks, views::audit) },
    ControlCommand { name: "contexts", run: |hooks, arguments| arguments.of(hooks, views::contexts) },
    ControlCommand { name: "faults", run: |hooks, arguments| arguments.of(hooks, views::faults) },
    ControlCommand { name: "findings", run: |hooks, arguments| arguments.of(hooks, views::findings) },
    ControlCommand { name: "inject", run: |hooks, arguments| arguments.of(hooks, inject) },
    ControlCommand { name: "iotlb", run: |hooks, arguments| arguments.of(hooks, views::iotlb) },
    ControlCommand { name: "jobs", run: |hooks, arguments| arguments.of(hooks, views::jobs) },
    ControlCommand { name: "query-commands", run: |hooks, arguments| arguments.of(hooks, query_commands) },
    ControlCommand { name: "quit", run: |hooks, arguments| arguments.of(hooks, quit) },
    ControlCommand { name: "record", run: |hooks, arguments| arguments.of(hooks, views::record) },
    ControlCommand { name: "stats", run: |hooks, arguments| arguments.of(hooks, stats) },
    ControlCommand { name: "violations", run: |hooks, arguments| arguments.of(hooks, views::violations) },
];

/// One line of a client, without its `id`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    execute: String,
    #[serde(default)]
    arguments: Map<String, Value>,
}

/// Why a line was refused. As in QMP, only an unknown command has its own error class.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("The line is not JSON")]
    NotJson(#[source] serde_json::Error),
    #[error("The line is not a request of the form {{\"execute\": NAME, \"arguments\": {{…}}, \"id\": ANY}}")]
    NotARequest(#[source] serde_json::Error),
    #[error("There is no command {0}; query-commands lists them")]
    UnknownCommand(String),
    #[error("The arguments of command {command} are wrong")]
    Arguments { command: &'static str, source: serde_json::Error },
    #[error(transparent)]
    Failed(Failure),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    NoAnswer(#[from] NoAnswer),
    #[error("The trace cannot be written to {}", path.display())]
    Trace { path: PathBuf, source: io::Error },
    #[error("Injection {name} cannot be changed: {why}")]
    Injection { name: String, why: String },
}

/// The first line that a client receives.
pub(super) fn greeting() -> String {
    json!({"MirrorGPU": {"version": env!("CARGO_PKG_VERSION"), "capabilities": []}}).to_string()
}

/// The answer to one line, whatever it contains.
pub(super) fn answer(hooks: &Hooks, line: &[u8]) -> String {
    let (id, result) = match serde_json::from_slice::<Value>(line) {
        Err(error) => (None, Err(Refusal::NotJson(error))),
        Ok(mut value) => {
            let id = value.as_object_mut().and_then(|object| object.remove("id"));
            (id, execute(hooks, value))
        }
    };
    let mut reply = match result {
        Ok(value) => json!({"return": value}),
        Err(refusal) => refusal.object(),
    };
    if let (Some(id), Some(object)) = (id, reply.as_object_mut()) {
        object.insert("id".to_owned(), id);
    }
    reply.to_string()
}

/// An error object as text.
pub(super) fn error(class: &str, description: &str) -> String {
    json!({"error": {"class": class, "desc": description}}).to_string()
}

fn execute(hooks: &Hooks, value: Value) -> Result<Value, Refusal> {
    let request: Request = serde_json::from_value(value).map_err(Refusal::NotARequest)?;
    let Some(command) = COMMANDS.iter().find(|command| command.name == request.execute) else {
        return Err(Refusal::UnknownCommand(request.execute));
    };
    (command.run)(hooks, Arguments { command: command.name, map: request.arguments })
}

impl Refusal {
    fn object(&self) -> Value {
        let class = match self {
            Self::UnknownCommand(_) => "CommandNotFound",
            _ => "GenericError",
        };
        let cause = std::error::Error::source(self).map(|cause| format!(": {cause}"));
        json!({"error": {"class": class, "desc": format!("{self}{}", cause.unwrap_or_default())}})
    }
}

fn query_commands(_: &Hooks, _: NoArguments) -> Result<Value, Failure> {
    Ok(COMMANDS.iter().map(|command| json!({"name": command.name})).collect())
}

fn quit(hooks: &Hooks, _: NoArguments) -> Result<Value, Failure> {
    (hooks.stop)();
    Ok(json!({}))
}

fn stats(hooks: &Hooks, _: NoArguments) -> Result<Value, Failure> {
    Ok(json!(hooks.stats.snapshot()))
}

/// What to turn on or off.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InjectArguments {
    on: Option<String>,
    /// What would follow the `=` of `--inject`.
    argument: Option<String>,
    off: Option<String>,
}

/// Turns seeded bugs and stress on and off, and lists all.
fn inject(hooks: &Hooks, arguments: InjectArguments) -> Result<Value, Failure> {
    let InjectArguments { on, argument, off } = arguments;
    if let Some(name) = off {
        hooks.injection.clear(&name).map_err(|why| Failure::Injection { name, why })?;
    }
    if let Some(name) = on {
        match hooks.injection.set(&name, argument.as_deref()) {
            Ok(()) => warn!("Injection {name} was turned on: this device misbehaves on purpose now"),
            Err(why) => return Err(Failure::Injection { name, why }),
        }
    }
    let rows = hooks.injection.list().into_iter().map(|row| {
        json!({
            "name": row.name,
            "usage": row.usage,
            "kind": row.kind.name(),
            "help": row.help,
            "on": row.on,
            "hits": row.hits,
        })
    });
    Ok(json!({ "injections": rows.collect::<Vec<_>>() }))
}
