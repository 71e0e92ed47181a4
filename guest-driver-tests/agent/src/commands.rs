//! What the rig can ask for, one function a command. Knows neither the port's lines nor any ioctl.

use crate::error::AgentError;
use crate::operations::Operations;
use crate::port::Port;
use crate::program::Programs;
use crate::screen::Screen;
use crate::second_kernel;
use crate::stock::Stock;
use crate::system::{self, End};
use crate::vfio::Gpu;
use crate::vfio_jobs;
use crate::{drm_jobs, drm_rings};
use guest_agent::protocol::{Amount, Command, Driver, Event};
use std::path::Path;

/// The agent between two commands.
pub(crate) struct Agent {
    port: Port,
    screen: Option<Screen>,
    /// The device, while our own driver has it.
    gpu: Option<Gpu>,
    /// What the rig has made with it.
    operations: Operations,
    stock: Stock,
    programs: Programs,
}

impl Agent {
    pub(crate) fn new(port: Port) -> Self {
        let (operations, stock, programs) = Default::default();
        Self { port, screen: None, gpu: None, operations, stock, programs }
    }

    /// Serves the rig's commands for ever. A command that fails is reported, and the next one awaited.
    pub(crate) fn serve(mut self) -> Result<(), AgentError> {
        loop {
            let event = match self.port.receive().and_then(|command| self.handle(command)) {
                Ok(event) => event,
                Err(AgentError::PortClosed) => return Err(AgentError::PortClosed),
                Err(error) => error.event(),
            };
            self.port.send(&event)?;
        }
    }

    fn handle(&mut self, command: Command) -> Result<Event, AgentError> {
        match command {
            Command::Picture(amount) => self.picture(amount),
            Command::Draw => self.draw(),
            Command::Stop => self.drawn(),
            Command::Release => {
                self.screen = None;
                Ok(Event::Released)
            }
            Command::Rebind { driver } => self.rebind(driver),
            Command::Jobs { mode, storm } => drm_jobs::run(mode, storm).map(Event::Ran),
            Command::Rings => drm_rings::run().map(Event::Rings),
            Command::TakeByVfio => self.take_by_vfio(),
            Command::JobsByVfio { mode, storm } => vfio_jobs::run(self.gpu()?, mode, storm).map(Event::Ran),
            Command::Break { mode, bug } => {
                vfio_jobs::break_on_purpose(self.gpu()?, mode, bug).map(Event::Broken)
            }
            Command::Operate { operation } => {
                let gpu = self.gpu.as_mut().ok_or(AgentError::NotTaken)?;
                self.operations.run(gpu, operation).map(|outcome| Event::Operated { outcome })
            }
            Command::Stock(command) => self.stock.handle(command).map(Event::Stock),
            Command::Program(program) => self.programs.run(&program).map(Event::Ended),
            Command::GiveBack => {
                self.operations = Operations::default();
                self.gpu.take().ok_or(AgentError::NotTaken)?.give_back()?;
                Ok(Event::Rebound)
            }
            Command::Load { way } => second_kernel::load(way).map(|reserved| Event::Loaded { reserved }),
            Command::Enter { way } => Err(second_kernel::enter(way)),
            Command::Dump { addresses } => {
                second_kernel::dump(&addresses).map(|words| Event::Dumped { words })
            }
            Command::Reboot => Err(system::end(End::Reboot)),
            Command::PowerOff => Err(system::end(End::PowerOff)),
        }
    }

    fn picture(&mut self, amount: Amount) -> Result<Event, AgentError> {
        let screen = self.screen()?;
        for _ in 0..amount.page_flips {
            screen.flip()?;
        }
        for _ in 0..amount.dirty_flushes {
            screen.flush_dirty()?;
        }
        if amount.cursor_moves > 0 {
            screen.show_cursor()?;
        }
        for step in 0..amount.cursor_moves {
            screen.move_cursor(step)?;
        }
        self.drawn()
    }

    /// Flips and churns buffers until the rig says `Stop`, or anything else.
    fn draw(&mut self) -> Result<Event, AgentError> {
        self.screen()?.flip()?;
        self.port.send(&Event::Drawing)?;
        loop {
            let screen = self.screen()?;
            screen.flip()?;
            screen.churn()?;
            if let Some(command) = self.port.try_receive()? {
                return self.handle(command);
            }
        }
    }

    fn drawn(&mut self) -> Result<Event, AgentError> {
        Ok(Event::Drawn(self.screen()?.take_counts()))
    }

    fn rebind(&mut self, driver: Driver) -> Result<Event, AgentError> {
        self.screen = None;
        match driver {
            Driver::VirtioGpu => system::rebind(Path::new("/sys/bus/virtio/drivers/virtio_gpu"), |_| true)?,
            Driver::VirtioPci => {
                system::rebind(Path::new("/sys/bus/pci/drivers/virtio-pci"), system::is_gpu)?
            }
        }
        system::wait_for_card()?;
        Ok(Event::Rebound)
    }

    fn take_by_vfio(&mut self) -> Result<Event, AgentError> {
        self.screen = None;
        self.gpu = Some(Gpu::take()?);
        Ok(Event::Taken)
    }

    fn gpu(&mut self) -> Result<&mut Gpu, AgentError> {
        self.gpu.as_mut().ok_or(AgentError::NotTaken)
    }

    fn screen(&mut self) -> Result<&mut Screen, AgentError> {
        match &mut self.screen {
            Some(screen) => Ok(screen),
            none => Ok(none.insert(Screen::take(&system::wait_for_card()?)?)),
        }
    }
}
