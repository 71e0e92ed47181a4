//! The guest's driver: turns operations into the bytes of commands, and knows what they must produce. It sends only
//! commands that make sense for what it has built, and leaves out the others.

use super::contexts::timeline;
use super::guest::{Resource, iova};
use super::ops::Op;
use super::oracle::{Expected, Kind};
use super::queue::Given;
use super::random::Random;
use super::world::{PAGES, RESOURCES, World};
use crate::addr::PAGE_SIZE;
use crate::image::Rect;
use crate::testing::requests;

/// A command without its number.
pub(super) struct Command {
    pub(super) device: usize,
    /// Its picture.
    pub(super) resource: u32,
    pub(super) bytes: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) fenced: bool,
    /// Context and ring of its timeline.
    pub(super) on_ring: Option<(u32, u8)>,
}

impl Command {
    /// A command that the oracle does not interpret.
    pub(super) fn plain(device: u8, bytes: Vec<u8>) -> Self {
        Self { device: device.into(), resource: 0, bytes, kind: Kind::Other, fenced: false, on_ring: None }
    }
}

impl World {
    /// Puts the commands of an operation on the ring.
    pub(super) fn drive(&mut self, op: Op) {
        if self.front_end.holds_the_guest() {
            return;
        }
        let commands = match self.command(op) {
            Some(command) => vec![command],
            None => self.context_commands(op).unwrap_or_default(),
        };
        for Command { device, resource, mut bytes, kind, fenced, on_ring } in commands {
            self.counts.commands += 1;
            let fence = fenced.then(|| timeline(device, on_ring));
            let number = self.oracle.given(device, kind, fence);
            if let Some((_, ring)) = on_ring {
                bytes = requests::on_ring(bytes, ring);
            }
            if fenced {
                bytes = requests::fenced(bytes, number as u64);
                self.oracle.fence_begins(number);
            }
            self.queue.ring.push_back(Given { number, bytes, resource });
        }
    }

    pub(super) fn resource(&mut self, device: u8, resource: u8) -> &mut Resource {
        &mut self.guest.resources[usize::from(device)][usize::from(resource) % RESOURCES]
    }

    fn command(&mut self, op: Op) -> Option<Command> {
        let (device, resource) = op.target()?;
        let number = id(resource);
        let plain = |bytes| (bytes, Kind::Other, false);
        let (bytes, kind, fenced) = match op {
            Op::Create { pages, .. } => plain(self.create(device, resource, pages)?),
            Op::Attach { order, .. } => plain(self.attach(device, resource, order)?),
            Op::Transfer { part, fenced, .. } => {
                let (bytes, kind) = self.transfer(device, resource, part)?;
                (bytes, kind, fenced)
            }
            Op::FlushImage { fenced, .. } => {
                let rect = whole(self.resource(device, resource).size?);
                (requests::flush(number, rect), Kind::Other, fenced)
            }
            Op::Show { .. } => {
                let rect = whole(self.resource(device, resource).size?);
                plain(requests::set_scanout(resource.into(), number, rect))
            }
            Op::Unref { fenced, .. } => {
                let known = std::mem::take(self.resource(device, resource));
                known.size.map(drop).or(known.buffer.map(drop))?;
                for context in self.guest.contexts[usize::from(device)].iter_mut().flatten() {
                    context.attached.remove(&resource);
                }
                let buffer =
                    known.buffer.filter(|_| known.backing.is_some()).map(|(_, generation)| generation);
                (requests::unref(number), Kind::Retire { buffer }, fenced)
            }
            Op::Detach { fenced, .. } => {
                let known = self.resource(device, resource);
                known.backing.take()?;
                let buffer = known.buffer.map(|(_, generation)| generation);
                (requests::detach_backing(number), Kind::Retire { buffer }, fenced)
            }
            Op::Garbage { seed, .. } => plain(garbage(seed)),
            _ => return None,
        };
        Some(Command { resource: number, kind, fenced, ..Command::plain(device, bytes) })
    }

    fn create(&mut self, device: u8, resource: u8, pages: u8) -> Option<Vec<u8>> {
        let known = self.resource(device, resource);
        if known.size.is_some() {
            return None;
        }
        // Rows whose length divides a page, and others.
        let width = if pages.is_multiple_of(2) { 32 } else { 40 };
        let height = (u32::from(pages) + 1) * PAGE_SIZE as u32 / (width * 4);
        known.size = Some((width, height));
        Some(requests::create_2d(id(resource), requests::B8G8R8X8, width, height))
    }

    pub(super) fn attach(&mut self, device: u8, resource: u8, order: u16) -> Option<Vec<u8>> {
        let entries = self.entries(device, resource, order)?;
        let bytes = requests::attach_backing(id(resource), &entries);
        let generation = self.guest.generation();
        let known = self.resource(device, resource);
        known.backing = Some(entries);
        known.buffer = known.buffer.map(|(bytes, _)| (bytes, generation));
        Some(bytes)
    }

    /// Memory for a resource that has none.
    pub(super) fn entries(&mut self, device: u8, resource: u8, order: u16) -> Option<Vec<(u64, u32)>> {
        let known = self.resource(device, resource);
        let picture = known.size.map(|(width, height)| u64::from(width * height * 4));
        let bytes = picture.or(known.buffer.map(|(bytes, _)| bytes)).filter(|_| known.backing.is_none())?;
        let (first, stride) = (usize::from(order) / 16, 1 + usize::from(order) % 16 / 3);
        let entry = |number: usize| {
            let page = iova((first + number * stride) % PAGES).raw();
            // Sometimes a part of a page.
            if number % 3 == 1 && order.is_multiple_of(7) {
                (page + 512, 3072)
            } else {
                (page, PAGE_SIZE as u32)
            }
        };
        Some((0..bytes.div_ceil(PAGE_SIZE) as usize).map(entry).collect())
    }

    fn transfer(&mut self, device: u8, resource: u8, part: u8) -> Option<(Vec<u8>, Kind)> {
        let known = self.resource(device, resource).clone();
        let ((width, height), backing) = (known.size?, known.backing?);
        let mut rect = whole((width, height));
        if part != 0 {
            let (part, x, y) = (u32::from(part), u32::from(part) % 16, u32::from(part) % height);
            rect = Rect { x, y, width: 1 + part % (width - x), height: 1 + (part / 2) % (height - y) };
        }
        let offset = u64::from(rect.y * width * 4 + rect.x * 4);
        let bytes = requests::transfer_to_host_2d(id(resource), rect, offset);
        Some((bytes, Kind::Transfer(Expected { image: None, rect, offset, backing, since: 0 })))
    }
}

/// The guest's number of a resource.
pub(super) fn id(resource: u8) -> u32 {
    u32::from(resource) + 1
}

fn whole((width, height): (u32, u32)) -> Rect {
    Rect { x: 0, y: 0, width, height }
}

/// An invalid command, or one for a resource that does not exist.
fn garbage(seed: u16) -> Vec<u8> {
    let mut random = Random::new(seed.into());
    let mut payload: Vec<u8> = (0..random.below(40)).map(|_| random.next() as u8).collect();
    if let Some(first) = payload.get_mut(3) {
        *first |= 0x80;
    }
    let mut bytes = requests::raw(0xff + random.below(0x14) as u32, &payload);
    if random.one_in(4) {
        bytes.truncate(random.index(bytes.len()));
    }
    bytes
}
