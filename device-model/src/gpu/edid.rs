//! A minimal EDID 1.4 block (VESA E-EDID A.2) for a display that did not provide one: one preferred timing, the name of
//! the monitor, sRGB. Knows a mode; knows nothing of commands. No guest-written number gets here: the mode is the
//! front-end's, and is clamped to what the fields can hold.

use crate::gpu::scanout::Edid;

/// Bytes of the block.
const BLOCK: usize = 128;
/// Where the first of four 18-byte descriptors begins, and their length.
const DESCRIPTORS: usize = 54;
const DESCRIPTOR: usize = 18;

/// The most pixels in one direction that a detailed timing can express (12 bits).
const MAX_PIXELS: u32 = 4095;
/// Blanking in pixels (lines), and the position of the synchronisation pulse in it: the values of CVT with reduced
/// blanking, which do not depend on the mode, except for the height of the vertical part.
const H_BLANK: u32 = 160;
const H_FRONT: u32 = 48;
const H_SYNC: u32 = 32;
const V_BLANK: u32 = 35;
const V_FRONT: u32 = 3;
const V_SYNC: u32 = 6;
/// Frames per second.
const REFRESH: u64 = 60;
/// Pixels per 100 mm, about 96 to the inch.
const PIXELS_PER_100_MM: u32 = 378;

/// Header to chromaticity (bytes 0 to 34) apart from the size: see the comments for each part.
const FIXED: [u8; 35] = [
    0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, // header
    0x36, 0x47, // manufacturer: "MRG", three letters of five bits
    0x01, 0x00, // product 1
    0x00, 0x00, 0x00, 0x00, // no serial number
    0x00, 36, // week not given, 1990 + 36
    0x01, 0x04, // EDID 1.4
    0xa5, // digital, 8 bits a colour, DisplayPort
    0x00, 0x00, // size in cm: filled in
    120,  // gamma 2.20
    0x06, // sRGB; the preferred timing is the native one
    0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54, // primaries and white of sRGB
];
/// Established timings: 640x480, 800x600 and 1024x768 at 60 Hz.
const ESTABLISHED: [u8; 3] = [0x21, 0x08, 0x00];
/// An empty descriptor (tag 0x10), and one with the name of the monitor (tag 0xfc).
const DUMMY: [u8; DESCRIPTOR] = [0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const NAME: [u8; DESCRIPTOR] = *b"\0\0\0\xfc\0MirrorGPU\n   ";

/// The EDID of a display that prefers `width` × `height` pixels.
pub(crate) fn generate(width: u32, height: u32) -> Edid {
    let (width, height) = (width.clamp(1, MAX_PIXELS), height.clamp(1, MAX_PIXELS));
    let mut block = [0_u8; BLOCK];
    block[..FIXED.len()].copy_from_slice(&FIXED);
    block[21] = low(millimetres(width).div_ceil(10));
    block[22] = low(millimetres(height).div_ceil(10));
    block[35..38].copy_from_slice(&ESTABLISHED);
    block[38..DESCRIPTORS].fill(0x01); // no standard timings
    let descriptors = [detailed_timing(width, height), NAME, DUMMY, DUMMY];
    for (place, descriptor) in block[DESCRIPTORS..].chunks_exact_mut(DESCRIPTOR).zip(descriptors) {
        place.copy_from_slice(&descriptor);
    }
    // The sum of all 128 bytes is 0.
    block[BLOCK - 1] = block.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
    block.to_vec()
}

/// The detailed timing of a mode (E-EDID A.2, 3.10.2).
fn detailed_timing(width: u32, height: u32) -> [u8; DESCRIPTOR] {
    let pixels = u64::from(width + H_BLANK) * u64::from(height + V_BLANK);
    // In units of 10 kHz. Modes that do not fit get a lower refresh rate.
    let clock = u16::try_from((pixels * REFRESH).div_ceil(10_000)).unwrap_or(u16::MAX).to_le_bytes();
    let (mm_x, mm_y) = (millimetres(width), millimetres(height));
    [
        clock[0],
        clock[1],
        low(width),
        low(H_BLANK),
        nibbles(width >> 8, H_BLANK >> 8),
        low(height),
        low(V_BLANK),
        nibbles(height >> 8, V_BLANK >> 8),
        low(H_FRONT),
        low(H_SYNC),
        nibbles(V_FRONT, V_SYNC),
        0, // the high bits of the four above
        low(mm_x),
        low(mm_y),
        nibbles(mm_x >> 8, mm_y >> 8),
        0,    // no border
        0,    // no border
        0x1a, // digital, separate pulses, the horizontal one positive, the vertical one negative: reduced blanking
    ]
}

/// The length of this many pixels.
fn millimetres(pixels: u32) -> u32 {
    (pixels * 100).div_ceil(PIXELS_PER_100_MM)
}

/// The low byte.
fn low(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// Two values of four bits in a byte.
fn nibbles(high: u32, low: u32) -> u8 {
    ((high.to_le_bytes()[0] & 0xf) << 4) | (low.to_le_bytes()[0] & 0xf)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Active pixels, lines, clock in Hz, and the totals with blanking.
    fn parse(edid: &[u8]) -> (u32, u32, u64, u32, u32) {
        let timing: Vec<u32> = edid[54..72].iter().map(|byte| u32::from(*byte)).collect();
        let clock = (timing[0] | timing[1] << 8) * 10_000;
        let width = timing[2] | (timing[4] >> 4) << 8;
        let height = timing[5] | (timing[7] >> 4) << 8;
        let h_total = width + (timing[3] | (timing[4] & 0xf) << 8);
        let v_total = height + (timing[6] | (timing[7] & 0xf) << 8);
        (width, height, clock.into(), h_total, v_total)
    }

    #[test]
    fn the_block_says_its_mode_at_sixty_hertz_and_adds_up_to_zero() {
        for (width, height) in [(1024, 768), (1920, 1080), (640, 480), (2560, 1440)] {
            let edid = generate(width, height);
            assert_eq!(edid.len(), 128);
            assert_eq!(edid.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            assert_eq!(edid[..8], [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
            assert_eq!(edid[18..20], [1, 4]);
            assert_eq!(edid[126], 0, "no extensions");
            let (w, h, clock, h_total, v_total) = parse(&edid);
            assert_eq!((w, h), (width, height));
            let centihertz = clock * 100 / (u64::from(h_total) * u64::from(v_total));
            assert!((5_990..=6_010).contains(&centihertz), "{centihertz}");
        }
    }

    #[test]
    fn the_manufacturer_and_the_name_can_be_read() {
        let edid = generate(1024, 768);
        let id = u16::from_be_bytes([edid[8], edid[9]]);
        let letter = |shift: u16| char::from(b'A' - 1 + u8::try_from((id >> shift) & 0x1f).unwrap());
        assert_eq!([letter(10), letter(5), letter(0)], ['M', 'R', 'G']);
        assert_eq!(&edid[72..90], b"\0\0\0\xfc\0MirrorGPU\n   ");
    }

    #[test]
    fn modes_that_no_field_can_hold_are_clamped() {
        let (width, height, clock, ..) = parse(&generate(u32::MAX, u32::MAX));
        assert_eq!((width, height, clock), (4095, 4095, 655_350_000));
        let (width, height, ..) = parse(&generate(0, 0));
        assert_eq!((width, height), (1, 1));
    }
}
