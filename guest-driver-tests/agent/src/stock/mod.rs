//! Scenarios with the stock driver, as the rig asks for them. Made of client (a context and its steered jobs), process
//! (a child that is killed), responses (the driver's tracepoints), and one file a group of scenarios. Knows which
//! command is whose.

mod blocks;
mod client;
mod failing;
mod foreign;
mod full;
mod huge;
mod life_cycle;
mod order;
mod platform;
mod points;
mod process;
mod responses;
mod strangers;
mod writer;

use crate::error::AgentError;
use client::Client;
use guest_agent::stock_words::{Amount, Standing, Stepped, StockCommand, StockEvent};
use std::os::fd::OwnedFd;
use std::time::Duration;
use writer::Writer;

/// What stands between two commands.
#[derive(Default)]
pub(crate) struct Stock {
    /// A context whose jobs were begun.
    client: Option<Client>,
    /// What is left of one.
    export: Option<OwnedFd>,
    /// A job that writes.
    writer: Option<Writer>,
}

impl Stock {
    /// Does what the rig asks for.
    pub(crate) fn handle(&mut self, command: StockCommand) -> Result<StockEvent, AgentError> {
        match command {
            StockCommand::Begin(amount) => self.begin(amount),
            StockCommand::More(amount) => self.more(amount),
            StockCommand::Look { wait_ms } => {
                life_cycle::look(self.client()?, Duration::from_millis(wait_ms)).map(StockEvent::Standing)
            }
            StockCommand::CloseBuffer => life_cycle::close_buffer(self.client()?).map(StockEvent::Standing),
            StockCommand::Finish => life_cycle::finish(self.take()?).map(StockEvent::Standing),
            StockCommand::Abandon => life_cycle::abandon(self.take()?).map(StockEvent::Standing),
            StockCommand::Forget => {
                self.client = None;
                Ok(StockEvent::Standing(Standing::default()))
            }
            StockCommand::KeepExport => {
                let client = self.take()?;
                client.wait_end()?;
                self.export = Some(client.export()?);
                client.standing().map(StockEvent::Standing)
            }
            StockCommand::DropExport => {
                self.export = None;
                Ok(StockEvent::Stepped(Stepped::default()))
            }
            StockCommand::Write => {
                self.writer = Some(Writer::begin()?);
                Ok(StockEvent::Stepped(Stepped::default()))
            }
            StockCommand::Step { step } => platform::take(step).map(StockEvent::Stepped),
            StockCommand::Huge { mib } => huge::run(mib).map(StockEvent::Huge),
            StockCommand::Kill { jobs } => process::kill(jobs).map(StockEvent::Standing),
            StockCommand::Strangers { process } => strangers::run(process).map(StockEvent::Strangers),
            StockCommand::Order { jobs } => order::run(jobs).map(StockEvent::Order),
            StockCommand::Overtaking => order::overtaking().map(StockEvent::Overtaking),
            StockCommand::Failing { how } => failing::run(how).map(StockEvent::Failing),
            StockCommand::Points => points::run().map(StockEvent::Points),
            StockCommand::Foreign => foreign::fences().map(StockEvent::Foreign),
            StockCommand::Share => foreign::buffers().map(StockEvent::Shared),
            StockCommand::Fill { jobs } => full::run(jobs).map(StockEvent::Full),
        }
    }

    fn begin(&mut self, amount: Amount) -> Result<StockEvent, AgentError> {
        // One that a scenario has left behind goes first.
        self.client = None;
        self.client = Some(Client::open()?);
        self.more(amount)
    }

    fn more(&mut self, amount: Amount) -> Result<StockEvent, AgentError> {
        life_cycle::submit(self.client()?, amount).map(StockEvent::Standing)
    }

    fn client(&mut self) -> Result<&mut Client, AgentError> {
        self.client.as_mut().ok_or(AgentError::NothingBegun)
    }

    fn take(&mut self) -> Result<Client, AgentError> {
        self.client.take().ok_or(AgentError::NothingBegun)
    }
}
