//! A guest that submits job streams: a context with three buffers in scattered frames, the operations that all tests
//! of jobs share, and a storm of jobs whose pages are unmapped while they run. Knows streams and pages; knows nothing
//! of modes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use job_stream::twin::{Buffers, interpret};
use job_stream::{At, Compare, Limits, Mode, Range, Space, SpinBehaviour, Stream, verify};

use super::addr::{PAGE, Permission};
use super::backend::Backend;
use super::dma::DmaBuffer;
use super::driver::Ticket;
use super::error::{Error, Result};
use super::frames::Dice;
use super::gpu::{Command, Response, kind};
use super::guest::{GuestConfig, SoftGuest};
use super::link::Ack;
use super::wire;

/// Pages of each buffer.
pub const PAGES: usize = 64;
/// Bytes of each buffer.
pub const BYTES: u64 = PAGES as u64 * PAGE;
/// How many jobs a storm has in flight.
const ON_THEIR_WAY: usize = 3;
/// Frames of a storm that are watched for late touches before they are used again.
const FRAMES_KEPT: u64 = 256;

/// A byte of a buffer, to a job.
pub fn place(id: u32, address: u64) -> At {
    At::new(Space::resource(id), address)
}

/// A whole buffer, to a job.
pub fn whole(id: u32) -> Range {
    place(id, 0).range(BYTES)
}

/// What is in a buffer at first.
pub fn contents(id: u32) -> Vec<u8> {
    (0..BYTES as u32).map(|at| (at.wrapping_mul(id.wrapping_mul(0x9e37_79b1) | 1) >> 24) as u8).collect()
}

/// Every packet except those whose result is a time.
pub fn every_packet() -> Stream {
    every_packet_at(place)
}

/// The same with the buffers wherever `place` says.
pub fn every_packet_at(place: impl Fn(u32, u64) -> At) -> Stream {
    Stream::new()
        .nop(3)
        .fill(place(1, 0x0ff4).range(0x2010), 0xdead_beef)
        .barrier()
        .copy(place(1, 0x0f01).range(0x2_1234), place(2, 0x0803))
        .checksum(place(2, 3).range(BYTES - 0x1003), place(3, 0x40))
        .signal(place(3, 0x48), 7)
        .signal64(place(3, 0x50), 1 << 40)
        .wait(place(3, 0x48), Compare::Equal, 7, 0)
        .add(place(3, 0x48), u32::MAX, Some(place(3, 0x4c)))
        .add64(place(3, 0x50), 5, Some(place(3, 0x58)))
        .cas(place(3, 0x48), 6, 99, Some(place(3, 0x60)))
        .cas64(place(3, 0x50), 0, 99, Some(place(3, 0x68)))
        .spin(SpinBehaviour::Preemptible, 1_000_000)
        .spin(SpinBehaviour::Stubborn, 100_000)
}

/// A guest with context 1 and the buffers 1, 2 and 3, of 256 KiB each.
#[derive(Debug)]
pub struct JobGuest {
    /// The guest.
    pub guest: SoftGuest,
    /// The buffers, from 1 on.
    pub buffers: Vec<DmaBuffer>,
    mode: Mode,
    fence: u64,
}

impl JobGuest {
    /// Boots it, and sets the mode of its context.
    pub fn boot(backend: &Backend, mode: Mode, seed: u64) -> Result<Self> {
        let mut guest = SoftGuest::boot(backend, GuestConfig { seed, ..GuestConfig::headless() })?;
        let mut buffers = Vec::new();
        for id in 1..=3 {
            let buffer = guest.dma.space().allocate(PAGES, Permission::ReadWrite)?;
            buffer.write(0, &contents(id))?;
            guest.driver.ok(&Command::create_buffer(id, BYTES as u32))?;
            guest.driver.ok(&Command::attach_backing(id, &buffer.segments(0, BYTES)))?;
            buffers.push(buffer);
        }
        let mut this = Self { guest, buffers, mode, fence: 0 };
        this.make_context(1)?;
        this.settle_mode()?;
        Ok(this)
    }

    fn settle_mode(&mut self) -> Result<()> {
        self.run(Stream::new().mode(self.mode)).map(drop)
    }

    /// Makes a context with all buffers.
    pub fn make_context(&mut self, ctx: u32) -> Result<()> {
        self.guest.driver.ok(&Command::ctx_create(ctx))?;
        for id in 1..=3 {
            self.guest.driver.ok(&Command::ctx_attach(ctx, id))?;
        }
        Ok(())
    }

    /// Submits a job with a fence to context 1.
    pub fn submit(&mut self, stream: Stream) -> Result<Ticket> {
        self.fence += 1;
        self.guest.driver.submit(&Command::submit_3d(1, &stream.finish()).fenced(self.fence))
    }

    /// Submits a job that must succeed.
    pub fn run(&mut self, stream: Stream) -> Result<Response> {
        let ticket = self.submit(stream)?;
        self.guest.driver.wait_ok(ticket)
    }

    /// A page keeps its address, stays mapped, and gets another frame. The old one is watched from the ack on.
    pub fn swap(&mut self, id: u32, page: usize) -> Result<Ack> {
        let frame = self.guest.dma.space().frames().take(1)?[0];
        self.guest.dma.swap_page(&mut self.buffers[id as usize - 1], page, frame)
    }

    /// All bytes of a buffer.
    pub fn bytes(&self, id: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; BYTES as usize];
        self.buffers[id as usize - 1].read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Waits until a word of a buffer has this value.
    pub fn wait_for_word(&self, id: u32, address: u64, value: u32) -> Result<()> {
        let (begin, most) = (Instant::now(), Duration::from_secs(5));
        let mut word = [0; 4];
        while word != value.to_le_bytes() {
            if begin.elapsed() > most {
                return Err(Error::Timeout { what: format!("Word {value:#x} in buffer {id}"), after: most });
            }
            wire::wait_readable(&[], Some(Duration::from_micros(100))).map_err(Error::io("wait"))?;
            self.buffers[id as usize - 1].read(address, &mut word)?;
        }
        Ok(())
    }

    /// Runs a job, and returns the buffers that differ from the reference interpreter's.
    pub fn differing_from_twin(&mut self, stream: Stream) -> Result<Vec<u32>> {
        let mut twin = Buffers::new();
        for id in 1..=3 {
            twin = twin.with(id, self.bytes(id)?);
        }
        let program = verify(&stream.clone().finish(), &Limits::default());
        // A refused or failed stream leaves the reference as it was, and the device reports more about it.
        let _ = program.map(|program| interpret(&program, &mut twin));
        self.run(stream)?;
        let mut differing = Vec::new();
        for id in 1..=3 {
            if self.bytes(id)? != twin.bytes(id) {
                differing.push(id);
            }
        }
        Ok(differing)
    }

    /// Keeps jobs in flight all the time and gives one of their pages another frame in each cycle, as no correct
    /// driver does. No frame may be touched after its ack; returns how many were checked. They are reused after that,
    /// so that a storm can be of any length.
    pub fn storm(&mut self, cycles: u64, seed: u64) -> Result<usize> {
        let mut dice = Dice::new(seed);
        let mut on_their_way: VecDeque<Ticket> = VecDeque::new();
        let mut clean = 0;
        let job = |word| {
            Stream::new().copy(whole(1), place(2, 0)).fill(whole(1), word).checksum(whole(2), place(3, 0))
        };
        self.run(job(0))?;
        let start = Instant::now();
        self.run(job(0))?;
        let usual = start.elapsed();
        for cycle in 0..cycles {
            while on_their_way.len() < ON_THEIR_WAY {
                on_their_way.push_back(self.submit(job(cycle as u32))?);
            }
            // Somewhere in a job.
            let pause = usual.mul_f64(dice.below(1000) as f64 / 1000.0);
            wire::wait_readable(&[], Some(pause)).map_err(Error::io("wait"))?;
            self.swap(1 + dice.below(2) as u32, dice.below(PAGES))?;
            let oldest = on_their_way.pop_front();
            if !self.is_done(oldest)? {
                self.renew(&mut on_their_way)?;
            }
            if cycle % FRAMES_KEPT == FRAMES_KEPT - 1 {
                self.renew(&mut on_their_way)?;
                clean += self.guest.dma.oracle().release()?;
            } else if cycle % 16 == 0 {
                self.guest.dma.oracle().check()?;
            }
        }
        self.renew(&mut on_their_way)?;
        Ok(clean + self.guest.dma.oracle().release()?)
    }

    /// Waits for a job of a storm. A job that has lost a page may fail: its memory was taken away.
    fn is_done(&mut self, ticket: Option<Ticket>) -> Result<bool> {
        let Some(ticket) = ticket else { return Ok(true) };
        let response = self.guest.driver.wait(ticket)?;
        match response.kind() {
            _ if response.is_ok() => Ok(true),
            kind::ERR_UNSPEC | kind::ERR_INVALID_CONTEXT_ID => Ok(false),
            other => Err(Error::Command { command: response.command, response: other }),
        }
    }

    /// Waits for all jobs, and makes a new context, because the old one may be lost.
    fn renew(&mut self, on_their_way: &mut VecDeque<Ticket>) -> Result<()> {
        for ticket in on_their_way.drain(..) {
            self.is_done(Some(ticket))?;
        }
        self.guest.driver.ok(&Command::ctx_destroy(1))?;
        self.make_context(1)?;
        self.settle_mode()
    }
}
