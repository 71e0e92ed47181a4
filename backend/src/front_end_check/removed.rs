//! Finds regions that are removed from the memory table while translations lead into them. Knows the payloads of the
//! two messages that remove regions.

use device_model::addr::{ByteRange, DomainId, Iova};

use super::World;
use super::book::Book;
use super::messages::{code, u32_at, u64_at};
use super::rules::Rule;
use crate::vhost_user::memory::Region;

/// Size of a region in a payload.
const REGION: usize = 32;

/// Identifies a region: guest-physical address, size, address in the front-end.
type Key = [u64; 3];

/// Checks whether a region that this message removes is still mapped.
pub(super) fn look(number: u32, payload: &[u8], world: World<'_>, book: &mut Book) {
    let gone = |region: &&Region| {
        let spec = region.spec();
        let key = [spec.gpa, spec.size, spec.user_address];
        if number == code::REM_MEM_REG {
            key_at(payload, 8) == Some(key)
        } else {
            stays(payload, key) == Some(false)
        }
    };
    for region in world.memory.regions().iter().filter(gone) {
        if let Some(range) = mapped_into(region, world) {
            let (first, size) = (region.spec().gpa, region.spec().size);
            let seen = format!(
                "the region of {size:#x} bytes at guest-physical {first:#x} goes away, and {range} leads there"
            );
            if let Some(found) = book.find(Rule::RegionRemovedWhileMapped, first, seen) {
                found.range = Some(range);
            }
        }
    }
}

/// Whether a new table contains a region; `None` if the payload could not be read completely.
fn stays(payload: &[u8], key: Key) -> Option<bool> {
    let count = u32_at(payload, 0)? as usize;
    let regions = payload.get(8..)?.chunks_exact(REGION);
    (regions.len() >= count).then(|| regions.take(count).any(|region| key_at(region, 0) == Some(key)))
}

fn key_at(payload: &[u8], at: usize) -> Option<Key> {
    let word = |index: usize| u64_at(payload, at.checked_add(index)?);
    Some([word(0)?, word(8)?, word(16)?])
}

/// A range of the device's translations that leads into the region.
fn mapped_into(region: &Region, world: World<'_>) -> Option<ByteRange<Iova>> {
    let first = region.host_at(0).addr() as u64;
    let last = first.saturating_add(region.spec().size.saturating_sub(1));
    let mut found = None;
    world.mirror.mapped_ranges(DomainId::DEVICE, ByteRange::everything(), |mapped| {
        if found.is_none() && (first..=last).contains(&mapped.host) {
            found = Some(mapped.range);
        }
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(keys: &[Key]) -> Vec<u8> {
        let mut payload = (keys.len() as u64).to_ne_bytes().to_vec();
        for [gpa, size, user] in keys {
            payload.extend([*gpa, *size, *user, 0].iter().flat_map(|word| word.to_ne_bytes()));
        }
        payload
    }

    #[test]
    fn a_region_stays_only_with_the_same_size_and_addresses() {
        let payload = table(&[[0, 0x1000, 0x7000], [0x10_0000, 0x2000, 0x9000]]);
        assert_eq!(stays(&payload, [0x10_0000, 0x2000, 0x9000]), Some(true));
        assert_eq!(stays(&payload, [0x10_0000, 0x1000, 0x9000]), Some(false));
        assert_eq!(stays(&payload, [0, 0x1000, 0x9000]), Some(false));
        // What could not be read is not judged.
        assert_eq!(stays(&payload[..40], [0x10_0000, 0x2000, 0x9000]), None);
    }
}
