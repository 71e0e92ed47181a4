//! The test picture: a pure function of width, height and frame number, in integers only, so that the host can
//! compute every pixel that the guest has drawn. Knows nothing of buffers beyond rows of bytes.
//!
//! Its parts, in the order of drawing: a background with a grid, rings, colour bars, ramps, the name with its
//! mirror image, and, anew for every frame, a panel with the frame's number and a marker that wanders.

use crate::font;

/// Bytes of a pixel: blue, green, red, and one that means nothing.
pub const PIXEL: usize = 4;

/// A colour as red, green, blue.
type Colour = [u8; 3];

const GRID: u32 = 40;
const BARS: [Colour; 8] = [
    [0xf4, 0xf4, 0xf4],
    [0xf2, 0xd0, 0x2c],
    [0x2c, 0xc8, 0xd8],
    [0x34, 0xc0, 0x50],
    [0xd0, 0x40, 0xc8],
    [0xe0, 0x38, 0x38],
    [0x30, 0x58, 0xe0],
    [0x10, 0x10, 0x14],
];
const NAME: &str = "MirrorGPU";
const CLAIM: &str = "A VIRTUAL GPU THAT MIRRORS THE GUEST'S IOMMU";
const PANEL: Colour = [0x0c, 0x10, 0x1c];
const INK: Colour = [0xff, 0xff, 0xff];
const ACCENT: Colour = [0xff, 0xb4, 0x30];

/// Pixels to draw on: `height` rows of `stride` bytes. What lies outside is dropped.
pub struct Canvas<'a> {
    bytes: &'a mut [u8],
    stride: usize,
    width: u32,
    height: u32,
}

impl<'a> Canvas<'a> {
    /// A canvas over `bytes`.
    pub fn new(bytes: &'a mut [u8], stride: usize, width: u32, height: u32) -> Self {
        Self { bytes, stride, width, height }
    }

    /// Draws the whole picture but the frame's own panel.
    pub fn draw_still(&mut self) {
        self.background();
        self.bars();
        self.ramps();
        self.name();
    }

    /// Draws what differs from frame to frame, and only that: it covers what the frame before has drawn.
    pub fn draw_frame(&mut self, frame: u32) {
        let panel = self.panel();
        self.fill(panel, PANEL);
        let text = format!("FRAME {:06}", frame % 1_000_000);
        let size = self.unit();
        let left = panel.x + size * 3;
        self.text(&text, (left, panel.y + size * 2), size, INK);
        let track = Area { x: left, y: panel.y + size * 11, width: panel.width - size * 6, height: size };
        self.fill(track, [0x30, 0x38, 0x50]);
        let marker = Area {
            x: track.x + frame.wrapping_mul(size) % (track.width - size * 4),
            width: size * 4,
            ..track
        };
        self.fill(marker, ACCENT);
    }

    /// The dots of the small text are this large; all else follows from it.
    fn unit(&self) -> u32 {
        (self.width / 426).max(1)
    }

    fn panel(&self) -> Area {
        let size = self.unit();
        let width = font::width("FRAME 000000") * size + size * 6;
        Area { x: (self.width.saturating_sub(width)) / 2, y: self.height * 13 / 16, width, height: size * 14 }
    }

    fn background(&mut self) {
        let (width, height) = (self.width.max(1), self.height.max(1));
        let (middle_x, middle_y) = (i64::from(width / 2), i64::from(height / 2));
        let ring = i64::from(height / 2 - height / 20);
        for y in 0..height {
            let dy = i64::from(y) - middle_y;
            for x in 0..width {
                let dx = i64::from(x) - middle_x;
                let near = dx * dx + dy * dy;
                let mut colour = [
                    (14 + 40 * y / height) as u8,
                    (20 + 60 * x / width) as u8,
                    (48 + 70 * (height - y) / height) as u8,
                ];
                if x % GRID == 0 || y % GRID == 0 {
                    colour = colour.map(|part| part + 22);
                }
                if is_on_ring(near, ring) || is_on_ring(near, ring * 3 / 5) {
                    colour = [0xc8, 0xd4, 0xe8];
                }
                self.set(x, y, colour);
            }
        }
    }

    fn bars(&mut self) {
        let (left, width) = (self.width / 8, self.width * 3 / 4);
        let (top, height) = (self.height / 10, self.height / 5);
        for (bar, colour) in (0u32..).zip(BARS) {
            let x = left + width * bar / BARS.len() as u32;
            let end = left + width * (bar + 1) / BARS.len() as u32;
            self.fill(Area { x, y: top, width: end - x, height }, colour);
        }
    }

    fn ramps(&mut self) {
        let (left, width) = (self.width / 8, self.width * 3 / 4);
        let height = self.height / 40;
        let masks: [Colour; 4] = [[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]];
        for (row, mask) in (0u32..).zip(masks) {
            let y = self.height * 3 / 10 + self.height / 40 + row * height;
            for x in 0..width {
                let level = (x * 255 / width.max(1)) as u8;
                let colour = mask.map(|part| part & level);
                self.fill(Area { x: left + x, y, width: 1, height }, colour);
            }
        }
    }

    /// The name, and under it what a still lake would make of it.
    fn name(&mut self) {
        let size = self.unit() * 4;
        let left = self.width.saturating_sub(font::width(NAME) * size) / 2;
        let top = self.height / 2;
        self.text(NAME, (left, top), size, INK);
        let lake = top + (font::ROWS * 2 + 1) * size;
        for (column, row) in font::dots(NAME) {
            let x = left + column * size;
            for line in 0..size {
                let y = lake - (row + 1) * size + line;
                let shade = 0x20 + (0x60 * (lake - y) / (font::ROWS * size)) as u8;
                self.fill(Area { x, y, width: size, height: 1 }, [shade, shade + 0x10, shade + 0x30]);
            }
        }
        let size = self.unit();
        let left = self.width.saturating_sub(font::width(CLAIM) * size) / 2;
        self.text(CLAIM, (left, lake + size * 5), size, ACCENT);
    }

    fn text(&mut self, text: &str, at: (u32, u32), size: u32, colour: Colour) {
        for (column, row) in font::dots(text) {
            let area = Area { x: at.0 + column * size, y: at.1 + row * size, width: size, height: size };
            self.fill(area, colour);
        }
    }

    fn fill(&mut self, area: Area, colour: Colour) {
        for y in area.y..area.y + area.height {
            for x in area.x..area.x + area.width {
                self.set(x, y, colour);
            }
        }
    }

    fn set(&mut self, x: u32, y: u32, [red, green, blue]: Colour) {
        if x >= self.width || y >= self.height {
            return;
        }
        let at = y as usize * self.stride + x as usize * PIXEL;
        if let Some(pixel) = self.bytes.get_mut(at..at + PIXEL) {
            pixel.copy_from_slice(&[blue, green, red, 0]);
        }
    }
}

/// A rectangle.
#[derive(Clone, Copy)]
struct Area {
    x: u32,
    y: u32,
    width: u32,
    height: u32,
}

/// Whether the squared distance `near` from the middle lies on a ring three pixels wide.
fn is_on_ring(near: i64, radius: i64) -> bool {
    (radius - 1) * (radius - 1) <= near && near <= (radius + 1) * (radius + 1)
}

/// The whole picture, rows without padding.
pub fn whole(width: u32, height: u32, frame: u32) -> Vec<u8> {
    let stride = width as usize * PIXEL;
    let mut bytes = vec![0; stride * height as usize];
    let mut canvas = Canvas::new(&mut bytes, stride, width, height);
    canvas.draw_still();
    canvas.draw_frame(frame);
    bytes
}

/// A cursor of 64 × 64 pixels with transparency: an arrow.
pub fn cursor() -> Vec<u8> {
    const SIZE: u32 = 64;
    let mut bytes = Vec::with_capacity((SIZE * SIZE) as usize * PIXEL);
    for y in 0..SIZE {
        for x in 0..SIZE {
            let inside = x <= y && x + y / 2 < SIZE / 2;
            let edge = inside && (x == 0 || x == y || x + y / 2 + 1 == SIZE / 2);
            bytes.extend_from_slice(match (inside, edge) {
                (_, true) => &[0, 0, 0, 0xff],
                (true, false) => &[0x30, 0xb4, 0xff, 0xff],
                (false, false) => &[0; PIXEL],
            });
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_drawn_over_another_is_the_frame_drawn_alone() {
        let (width, height) = (640, 400);
        let mut bytes = whole(width, height, 7);
        Canvas::new(&mut bytes, width as usize * PIXEL, width, height).draw_frame(12_345);
        assert!(bytes == whole(width, height, 12_345));
        assert!(bytes != whole(width, height, 12_346));
    }

    #[test]
    fn any_size_can_be_drawn_on() {
        for (width, height) in [(40, 1), (64, 64), (320, 200), (1024, 768), (1280, 800), (1920, 1080)] {
            assert_eq!(whole(width, height, u32::MAX).len(), width as usize * height as usize * PIXEL);
        }
    }
}
