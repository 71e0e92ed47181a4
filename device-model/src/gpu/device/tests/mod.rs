//! The device from outside: a harness that records the effects, and the promises, one file for each family.

use super::*;
use crate::addr::{ByteRange, Iova};
use crate::image::Rect;
use crate::jobs::job::{JobError, Step};
use crate::testing::memory::SparseMemory;
use crate::testing::requests::*;
use crate::wire::gpu::response::*;

mod address_spaces;
mod contexts;
mod cursor;
mod display;
mod faults;
mod hostile;
mod jobs;
mod resources;
mod ring;
#[cfg(not(loom))]
mod streams;

/// A device with all its effects. Pending commands are numbers.
struct Harness {
    device: Device<u64>,
    memory: SparseMemory,
    sent: u64,
    /// Every completion, in order.
    completed: Vec<(u64, Response)>,
    jobs: Vec<Job>,
    shown: Vec<DisplayCommand>,
    asked: Vec<(u64, DisplayQuery)>,
    /// Answers to faults.
    resumed: Vec<(JobWait, Result<(), JobError>)>,
}

impl Harness {
    fn new() -> Self {
        Self::with(DeviceConfig { scanouts: 2, announced_scanouts: 2, ..DeviceConfig::default() })
    }

    fn with(config: DeviceConfig) -> Self {
        let mut device = Device::new(config);
        device.set_features(features());
        Self {
            device,
            memory: SparseMemory::new(),
            sent: 0,
            completed: Vec::new(),
            jobs: Vec::new(),
            shown: Vec::new(),
            asked: Vec::new(),
            resumed: Vec::new(),
        }
    }

    fn absorb(&mut self, effects: Vec<Effect<u64>>) {
        for effect in effects {
            match effect {
                Effect::Complete { pending, response } => self.completed.push((pending, response)),
                Effect::Run(job) => self.jobs.push(job),
                Effect::AnswerFault { wait, answer } => self.resumed.push((wait, answer)),
                Effect::Display(command) => self.shown.push(command),
                Effect::Ask { ticket, question } => self.asked.push((ticket, question)),
            }
        }
    }

    /// Sends a command to the control queue; returns its number.
    fn send(&mut self, request: &[u8]) -> u64 {
        let (id, mut effects) = (self.sent, Vec::new());
        self.sent += 1;
        self.device.control(request, id, &mut effects);
        self.absorb(effects);
        id
    }

    /// Sends a command to the cursor queue; returns its number.
    fn send_cursor(&mut self, request: &[u8]) -> u64 {
        let (id, mut effects) = (self.sent, Vec::new());
        self.sent += 1;
        self.device.cursor(request, id, &mut effects);
        self.absorb(effects);
        id
    }

    /// The response to a command, if it went out.
    fn response(&self, id: u64) -> Option<&Response> {
        self.completed.iter().find(|(other, _)| *other == id).map(|(_, response)| response)
    }

    /// The type of the response to a command that is answered at once.
    fn status(&mut self, request: &[u8]) -> u32 {
        let id = self.send(request);
        self.response(id).expect("an answer at once").kind()
    }

    fn status_of_cursor(&mut self, request: &[u8]) -> u32 {
        let id = self.send_cursor(request);
        self.response(id).expect("an answer at once").kind()
    }

    /// The commands answered since the last call, with their response types.
    fn answers(&mut self) -> Vec<(u64, u32)> {
        self.completed.drain(..).map(|(id, response)| (id, response.kind())).collect()
    }

    /// Gives the oldest job back with an outcome.
    fn finish(&mut self, outcome: JobOutcome) {
        let (job, mut effects) = (self.jobs.remove(0), Vec::new());
        self.device.job_finished(job, outcome, &mut effects);
        self.absorb(effects);
    }

    /// Steps the oldest job to its end and gives it back.
    fn run(&mut self) {
        while self.jobs[0].step(&self.memory, 64 << 10) == Step::Yield {}
        assert_eq!(self.jobs[0].step(&self.memory, 64 << 10), Step::Done);
        self.finish(JobOutcome::Done);
    }

    fn answer(&mut self, ticket: u64, answer: DisplayAnswer) {
        let mut effects = Vec::new();
        self.device.display_answer(ticket, answer, &mut effects);
        self.absorb(effects);
    }

    /// A resource of `width` × `height` pixels with a backing of its size at `at`.
    fn resource(&mut self, id: u32, width: u32, height: u32, at: u64) {
        let bytes = width * height * 4;
        self.memory.fill(ByteRange::new(Iova::new(at), bytes.into()).unwrap());
        assert_eq!(self.status(&create_2d(id, B8G8R8X8, width, height)), OK_NODATA);
        assert_eq!(self.status(&attach_backing(id, &[(at, bytes)])), OK_NODATA);
    }
}

fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
    Rect { x, y, width, height }
}

/// Little-endian word `index` of a response.
fn word(response: &Response, index: usize) -> u32 {
    let bytes = &response.as_bytes()[index * 4..][..4];
    u32::from_le_bytes(bytes.try_into().unwrap())
}
