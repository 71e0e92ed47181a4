//! Prepares pixels for the display: splits a changed rectangle into messages of bounded size, and converts the image's
//! format to x8r8g8b8. Knows images; knows nothing of sockets or of what was shown before.

use device_model::gpu::scanout::{ChannelOrder, ScanoutSource};
use device_model::image::Rect;

/// Bytes per pixel, in every format of a 2D resource and on the display socket.
const PIXEL: usize = 4;
/// Maximum number of bytes copied while an image is locked: this bounds how long its other users wait.
const LOCKED_COPY: usize = 64 << 10;
/// Maximum size of the pixels in one UPDATE. The protocol allows 4 GiB; QEMU's main loop reads a message in one go.
const MESSAGE: usize = 256 << 10;

/// The pieces in which `rect` is sent, in order: none exceeds [`MESSAGE`] bytes, none is empty, together they cover
/// `rect`.
pub(super) fn pieces(rect: Rect) -> impl Iterator<Item = Rect> {
    let columns = (LOCKED_COPY / PIXEL) as u32;
    split(rect.width, columns).flat_map(move |(x, width)| {
        let rows = rows_within(MESSAGE, width);
        split(rect.height, rows).map(move |(y, height)| Rect {
            x: rect.x.saturating_add(x),
            y: rect.y.saturating_add(y),
            width,
            height,
        })
    })
}

/// Splits 0..total into (start, length) of at most `most`, which is not 0.
fn split(total: u32, most: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..total).step_by(most.max(1) as usize).map(move |start| (start, most.min(total.saturating_sub(start))))
}

/// How many rows of `width` pixels fit into `bytes`, but at least one.
fn rows_within(bytes: usize, width: u32) -> u32 {
    let row = (width as usize).saturating_mul(PIXEL).max(1);
    u32::try_from((bytes / row).max(1)).unwrap_or(u32::MAX)
}

/// Reads the piece `rect` (in coordinates of the scanout) as x8r8g8b8, little-endian, into `out`, which is overwritten.
/// The image is locked for one bounded copy at a time, so writers never wait for a whole picture.
pub(super) fn read(source: &ScanoutSource, rect: Rect, out: &mut Vec<u8>) {
    out.clear();
    for (y, height) in split(rect.height, rows_within(LOCKED_COPY, rect.width)) {
        let pixels = source.image.lock();
        for row in y..y.saturating_add(height) {
            copy_row(source, &pixels, Rect { y: rect.y.saturating_add(row), height: 1, ..rect }, out);
        }
    }
    // If the source exceeds its image, the rest is black: a message is never shorter than its header says.
    out.resize((rect.width as usize).saturating_mul(rect.height as usize).saturating_mul(PIXEL), 0);
}

fn copy_row(source: &ScanoutSource, pixels: &[u8], row: Rect, out: &mut Vec<u8>) {
    let x = (source.rect.x as usize).saturating_add(row.x as usize);
    let y = (source.rect.y as usize).saturating_add(row.y as usize);
    let start = y.saturating_mul(source.image.stride()).saturating_add(x.saturating_mul(PIXEL));
    let end = start.saturating_add((row.width as usize).saturating_mul(PIXEL));
    if let Some(bytes) = pixels.get(start..end) {
        convert(source.order, bytes, out);
    }
}

/// Appends pixels in the image's channel order as x8r8g8b8: blue, green, red, and 255 in the unused byte.
fn convert(order: ChannelOrder, pixels: &[u8], out: &mut Vec<u8>) {
    let [blue, green, red] = [order.blue, order.green, order.red].map(|index| 8 * (u32::from(index) & 3));
    out.extend(pixels.as_chunks::<PIXEL>().0.iter().flat_map(|pixel| {
        let pixel = u32::from_le_bytes(*pixel);
        let channel = |shift: u32| (pixel >> shift) & 0xff;
        (0xff00_0000 | channel(red) << 16 | channel(green) << 8 | channel(blue)).to_le_bytes()
    }));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use device_model::image::Image;

    use super::*;

    fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
        Rect { x, y, width, height }
    }

    #[test]
    fn pieces_make_up_the_whole_and_none_exceeds_a_message() {
        for whole in [rect(3, 5, 1920, 1080), rect(0, 0, 1, 1), rect(7, 0, 40_000, 3), rect(0, 9, 16_384, 17)]
        {
            let mut area = 0;
            let mut end = (whole.x, whole.y);
            for piece in pieces(whole) {
                assert!(piece.width > 0 && piece.height > 0);
                let bytes = piece.width as usize * piece.height as usize * PIXEL;
                assert!(bytes <= MESSAGE, "{piece:?} has {bytes} bytes");
                area += u64::from(piece.width) * u64::from(piece.height);
                end = (end.0.max(piece.x + piece.width), end.1.max(piece.y + piece.height));
            }
            assert_eq!(area, u64::from(whole.width) * u64::from(whole.height));
            assert_eq!(end, (whole.x + whole.width, whole.y + whole.height));
        }
        assert_eq!(pieces(rect(0, 0, 0, 10)).count(), 0);
    }

    #[test]
    fn a_rect_inside_the_shown_part_is_read_from_the_right_place() {
        let image = Arc::new(Image::new(4, 3).unwrap());
        for (index, pixel) in image.lock().chunks_exact_mut(4).enumerate() {
            pixel.copy_from_slice(&[index as u8, 100, 200, 77]);
        }
        let order = ChannelOrder { blue: 0, green: 1, red: 2 };
        let source = ScanoutSource { image, order, rect: rect(1, 1, 3, 2) };
        let mut out = vec![9; 1];
        read(&source, rect(1, 0, 2, 2), &mut out);
        // Image pixels (2,1), (3,1), (2,2), (3,2) have the indices 6, 7, 10, 11.
        let expected: Vec<u8> = [6, 7, 10, 11].into_iter().flat_map(|index| [index, 100, 200, 255]).collect();
        assert_eq!(out, expected);
    }

    #[test]
    fn every_order_of_channels_becomes_blue_green_red() {
        let orders = [(0, 1, 2), (2, 1, 0), (1, 2, 3), (3, 2, 1)];
        for (blue, green, red) in orders {
            let mut pixel = [0xee; 4];
            pixel[usize::from(blue)] = 1;
            pixel[usize::from(green)] = 2;
            pixel[usize::from(red)] = 3;
            let mut out = Vec::new();
            convert(ChannelOrder { blue, green, red }, &pixel, &mut out);
            assert_eq!(out, [1, 2, 3, 255], "order {blue} {green} {red}");
        }
    }

    #[test]
    fn a_source_beyond_its_image_gives_black_of_the_announced_size() {
        let image = Arc::new(Image::new(2, 2).unwrap());
        image.lock().fill(0xff);
        let order = ChannelOrder { blue: 0, green: 1, red: 2 };
        let source = ScanoutSource { image, order, rect: rect(u32::MAX, u32::MAX, 2, 2) };
        let mut out = Vec::new();
        read(&source, rect(0, 0, 2, 2), &mut out);
        assert_eq!(out, [0; 16]);
    }
}
