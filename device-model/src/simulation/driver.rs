//! The guest's driver: turns operations into the bytes of commands, and knows what they have to bring. It gives only
//! commands that make sense for what it has built; what does not is left out.

use super::guest::{Resource, iova};
use super::ops::Op;
use super::oracle::{Expected, Kind};
use super::queue::Given;
use super::random::Random;
use super::world::{PAGES, RESOURCES, World};
use crate::addr::PAGE_SIZE;
use crate::scanout::Rect;
use crate::testing::requests;

/// A command before it has its number.
struct Command {
    device: usize,
    resource: usize,
    bytes: Vec<u8>,
    kind: Kind,
    fenced: bool,
}

impl World {
    /// Puts a command on the ring.
    pub(super) fn drive(&mut self, op: Op) {
        if self.front_end.holds_the_guest() {
            return;
        }
        let Some(command) = self.command(op) else { return };
        let Command { device, resource, mut bytes, kind, fenced } = command;
        self.counts.commands += 1;
        let number = self.oracle.given(device, kind, fenced);
        if fenced {
            bytes = requests::fenced(bytes, number as u64);
            self.oracle.fence_begins(number);
        }
        self.queue.ring.push_back(Given { number, bytes, resource: id(resource) });
    }

    fn resource(&mut self, device: u8, resource: u8) -> &mut Resource {
        &mut self.guest.resources[usize::from(device)][usize::from(resource) % RESOURCES]
    }

    fn command(&mut self, op: Op) -> Option<Command> {
        let (device, resource) = op.target()?;
        let number = id(resource.into());
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
                self.resource(device, resource).size?;
                *self.resource(device, resource) = Resource::default();
                (requests::unref(number), Kind::Retire, fenced)
            }
            Op::Detach { fenced, .. } => {
                self.resource(device, resource).backing.take()?;
                (requests::detach_backing(number), Kind::Retire, fenced)
            }
            Op::Garbage { seed, .. } => plain(garbage(seed)),
            _ => return None,
        };
        Some(Command { device: device.into(), resource: resource.into(), bytes, kind, fenced })
    }

    fn create(&mut self, device: u8, resource: u8, pages: u8) -> Option<Vec<u8>> {
        let known = self.resource(device, resource);
        if known.size.is_some() {
            return None;
        }
        // Rows that divide a page, and rows that do not.
        let width = if pages.is_multiple_of(2) { 32 } else { 40 };
        let height = (u32::from(pages) + 1) * PAGE_SIZE as u32 / (width * 4);
        known.size = Some((width, height));
        Some(requests::create_2d(id(resource.into()), requests::B8G8R8X8, width, height))
    }

    fn attach(&mut self, device: u8, resource: u8, order: u16) -> Option<Vec<u8>> {
        let known = self.resource(device, resource);
        let (width, height) = known.size.filter(|_| known.backing.is_none())?;
        let pages = (width * height * 4).div_ceil(PAGE_SIZE as u32) as usize;
        let (first, stride) = (usize::from(order) / 16, 1 + usize::from(order) % 16 / 3);
        let entry = |number: usize| {
            let page = iova((first + number * stride) % PAGES).raw();
            // Now and then a part of a page.
            if number % 3 == 1 && order.is_multiple_of(7) {
                (page + 512, 3072)
            } else {
                (page, PAGE_SIZE as u32)
            }
        };
        let entries: Vec<_> = (0..pages).map(entry).collect();
        let bytes = requests::attach_backing(id(resource.into()), &entries);
        known.backing = Some(entries);
        Some(bytes)
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
        let bytes = requests::transfer_to_host_2d(id(resource.into()), rect, offset);
        Some((bytes, Kind::Transfer(Expected { image: None, rect, offset, backing, since: 0 })))
    }
}

fn id(resource: usize) -> u32 {
    resource as u32 + 1
}

fn whole((width, height): (u32, u32)) -> Rect {
    Rect { x: 0, y: 0, width, height }
}

/// A command that is none, or about resources that nobody has.
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
