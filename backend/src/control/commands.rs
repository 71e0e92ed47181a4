//! What can be asked on the control socket. A command is one row of [`COMMANDS`] and one handler. Knows JSON text;
//! knows nothing of sockets.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Hooks;

/// A command.
struct Command {
    name: &'static str,
    run: fn(&Hooks) -> Value,
}

const COMMANDS: &[Command] = &[
    Command { name: "query-commands", run: query_commands },
    Command { name: "quit", run: quit },
    Command { name: "stats", run: stats },
];

/// One line of a client, apart from its `id`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    execute: String,
    #[serde(default)]
    arguments: Map<String, Value>,
}

/// Why a line was refused. As in QMP, only an unknown command has a class of its own.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("The line is not JSON")]
    NotJson(#[source] serde_json::Error),
    #[error("The line is not a request of the form {{\"execute\": NAME, \"arguments\": {{…}}, \"id\": ANY}}")]
    NotARequest(#[source] serde_json::Error),
    #[error("There is no command {0}; query-commands lists them")]
    UnknownCommand(String),
    #[error("Command {command} knows no argument {argument}")]
    UnknownArgument { command: String, argument: String },
}

/// The first line that a client sees.
pub(super) fn greeting() -> String {
    json!({"MirrorGPU": {"version": env!("CARGO_PKG_VERSION"), "capabilities": []}}).to_string()
}

/// The answer to one line, whatever it holds.
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

/// An error object, as text.
pub(super) fn error(class: &str, description: &str) -> String {
    json!({"error": {"class": class, "desc": description}}).to_string()
}

fn execute(hooks: &Hooks, value: Value) -> Result<Value, Refusal> {
    let request: Request = serde_json::from_value(value).map_err(Refusal::NotARequest)?;
    let Some(command) = COMMANDS.iter().find(|command| command.name == request.execute) else {
        return Err(Refusal::UnknownCommand(request.execute));
    };
    match request.arguments.into_iter().next() {
        Some((argument, _)) => Err(Refusal::UnknownArgument { command: request.execute, argument }),
        None => Ok((command.run)(hooks)),
    }
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

fn query_commands(_: &Hooks) -> Value {
    COMMANDS.iter().map(|command| json!({"name": command.name})).collect()
}

fn quit(hooks: &Hooks) -> Value {
    (hooks.stop)();
    json!({})
}

fn stats(hooks: &Hooks) -> Value {
    json!(hooks.stats.snapshot())
}
