//! The part of the guest's driver for contexts, buffers and job streams.

use std::collections::BTreeSet;

use job_stream::{Choice, Mode};

use super::driver::{Command, id};
use super::follower::Places;
use super::guest::{Context, page_at};
use super::ops::Op;
use super::oracle::{Kind, Timeline};
use super::random::Random;
use super::streams::{self, Wanted};
use super::submitted::{ContextKey, Submitted};
use super::world::World;
use crate::addr::{Iova, PAGE_SIZE};
use crate::testing::requests;

/// The guest's number of a context.
fn number(context: u8) -> u32 {
    u32::from(context) + 1
}

impl World {
    /// The commands of an operation on contexts and buffers; none if it makes no sense now.
    pub(super) fn context_commands(&mut self, op: Op) -> Option<Vec<Command>> {
        let command = match op {
            Op::Buffer { device, resource, pages, order, blob } => {
                return self.buffer((device, resource), pages, order, blob);
            }
            Op::Context { device, context, mode, init } => {
                let init = if init { job_stream::CAPSET_ID } else { 0 };
                self.create_context((device, context), Mode::from_raw(mode.into()))?;
                Command::plain(device, requests::ctx_create_for(number(context), init))
            }
            Op::Destroy { device, context, fenced } => {
                let key = self.guest.contexts[usize::from(device)][usize::from(context)].take()?.key;
                let kind = Kind::Behind { context: key, ends: true };
                Command { kind, fenced, ..Command::plain(device, requests::ctx_destroy(number(context))) }
            }
            Op::Share { device, context, resource } => {
                self.resource(device, resource).buffer?;
                let known = self.context(device, context)?;
                known.attached.insert(resource);
                Command::plain(device, requests::ctx_attach(number(context), id(resource)))
            }
            Op::Unshare { device, context, resource, fenced } => {
                let known = self.context(device, context)?;
                let key = known.attached.remove(&resource).then_some(known.key)?;
                let bytes = requests::ctx_detach(number(context), id(resource));
                let kind = Kind::Behind { context: key, ends: false };
                Command { kind, fenced, ..Command::plain(device, bytes) }
            }
            Op::Move { device, context, resource, to_host, fenced } => {
                let width = self.resource(device, resource).buffer?.0 as u32;
                let known = self.context(device, context)?;
                let key = known.attached.contains(&resource).then_some(known.key)?;
                let bytes = requests::transfer_3d(to_host, number(context), id(resource), 0, width);
                let kind = Kind::Behind { context: key, ends: false };
                Command { kind, fenced, ..Command::plain(device, bytes) }
            }
            Op::Submit { device, context, ring, seed, fenced } => {
                self.submit((device, context, ring), seed, fenced)?
            }
            _ => return None,
        };
        Some(vec![command])
    }

    fn context(&mut self, device: u8, context: u8) -> Option<&mut Context> {
        self.guest.contexts[usize::from(device)][usize::from(context)].as_mut()
    }

    fn create_context(&mut self, (device, context): (u8, u8), mode: Option<Mode>) -> Option<()> {
        let generation = self.guest.generation();
        let key = ContextKey { device: device.into(), number: number(context), generation };
        let known = &mut self.guest.contexts[usize::from(device)][usize::from(context)];
        if known.is_some() {
            return None;
        }
        *known = Some(Context { key, mode, has_jobs: false, attached: BTreeSet::new() });
        Some(())
    }

    fn buffer(
        &mut self,
        (device, resource): (u8, u8),
        pages: u8,
        order: u16,
        blob: bool,
    ) -> Option<Vec<Command>> {
        let generation = self.guest.generation();
        let known = self.resource(device, resource);
        if known.buffer.is_some() {
            return None;
        }
        let bytes = (1 + u64::from(pages % 3)) * PAGE_SIZE;
        known.buffer = Some((bytes, generation));
        if !blob {
            let create = requests::create_buffer(id(resource), bytes as u32);
            let attach = self.attach(device, resource, order)?;
            return Some([create, attach].map(|bytes| Command::plain(device, bytes)).into());
        }
        let entries = self.entries(device, resource, order)?;
        let size = entries.iter().map(|(_, len)| u64::from(*len)).sum();
        let create = requests::create_blob(id(resource), size, &entries);
        let known = self.resource(device, resource);
        (known.buffer, known.backing) = (Some((size, generation)), Some(entries));
        Some(vec![Command::plain(device, create)])
    }

    fn submit(&mut self, (device, context, ring): (u8, u8, u8), seed: u32, fenced: bool) -> Option<Command> {
        let known = self.context(device, context)?.clone();
        let mut random = Random::new(seed.into());
        let (mut buffers, mut named, mut places) = (Vec::new(), BTreeSet::new(), Places::new());
        for &resource in &known.attached {
            let found = self.resource(device, resource).clone();
            if let (Some((bytes, generation)), Some(backing)) = (found.buffer, found.backing) {
                let backed = backing.iter().map(|(_, len)| u64::from(*len)).sum();
                buffers.push((id(resource), bytes.min(backed)));
                named.insert((id(resource), generation));
                places.insert(id(resource), backing);
            }
        }
        let mode = known.mode.filter(|_| !known.has_jobs || random.one_in(3));
        let wanted = Wanted {
            number: self.oracle.next_number(),
            mode,
            buffers: &buffers,
            aliased: is_aliased(&places),
        };
        let (bytes, program) = streams::stream(&mut random, &wanted);
        let spaces: BTreeSet<u32> =
            program.operands().map(|(_, operand)| operand.range.space.raw()).collect();
        let named = named.into_iter().filter(|(id, _)| spaces.contains(id)).map(|(_, buffer)| buffer);
        if self.trace.is_watched() {
            program.packets().iter().for_each(|packet| println!("              {packet:?}"));
        }
        let (named, queue) = (named.collect(), (known.key, ring.saturating_sub(1)));
        let submitted = Submitted::new(queue, known.mode, program, (places, named));
        // A careful driver gives a job no memory that it is unmapping: the unmap returns after the ack.
        if self.flavor.careful && self.guest.pages_being_taken().any(|page| submitted.touches(page)) {
            self.counts.events_left_out += 1;
            return None;
        }
        if let Some(known) = self.context(device, context) {
            known.has_jobs = true;
        }
        let bytes = requests::submit_3d(number(context), &bytes);
        let kind = Kind::Job(Box::new(submitted));
        let command = Command { kind, fenced, ..Command::plain(device, bytes) };
        let on_ring = ring.checked_sub(1).map(|ring| (number(context), ring));
        Some(Command { on_ring, ..command })
    }
}

/// The timeline of a command's fence.
pub(super) fn timeline(device: usize, on_ring: Option<(u32, u8)>) -> Timeline {
    (device, on_ring)
}

/// Whether two of the buffers share a page.
fn is_aliased(places: &Places) -> bool {
    let mut pages = BTreeSet::new();
    let mut entries = places.values().flatten();
    !entries.all(|(at, _)| page_at(Iova::new(*at)).is_some_and(|page| pages.insert(page)))
}
