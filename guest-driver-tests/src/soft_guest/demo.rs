//! `cargo demo -- --soft`: the test picture of the real guest, drawn by the soft guest in strict and in lazy mode,
//! compared pixel by pixel and written as PNG files. Knows what is drawn; how a guest works is in `guest`.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_agent::picture;

use super::backend::Backend;
use super::control::Stats;
use super::driver::Queue;
use super::error::{Error, Result};
use super::gpu::{Command, Format, Rect};
use super::guest::{GuestConfig, SoftGuest, Surface};
use super::wire;

/// What the demo has shown.
#[derive(Debug)]
pub struct SoftDemoReport {
    /// Strict, then lazy.
    pub modes: Vec<Shown>,
}

/// What one mode has shown.
#[derive(Debug)]
pub struct Shown {
    /// `strict` or `lazy`.
    pub mode: &'static str,
    /// The screen, as the display has got it.
    pub picture: PathBuf,
    /// Frames that the guest has drawn.
    pub frames: u32,
    /// Positions of the cursor that the display has seen.
    pub cursor_moves: u64,
    /// Frames of memory that were unmapped, and never touched again.
    pub frames_clean: usize,
    /// The back-end's counters at the end.
    pub stats: Stats,
}

const FRAMES: u32 = 60;
/// Pixels of the screen: large enough that a transfer takes its time.
const SIZE: (u32, u32) = (1280, 720);
/// Each frame is transferred in this many pieces.
const BANDS: u32 = 2;
/// Each frame is transferred this many times, like a desktop that redraws unchanged pixels.
pub const PASSES: u32 = 3;
/// A lazy guest flushes that often, in frames drawn.
const FLUSH_EVERY: u32 = 2;

/// Draws in both modes, and puts the pictures into `directory`. `progress` is called with each step.
pub fn run(directory: &Path, progress: &dyn Fn(&str)) -> Result<SoftDemoReport> {
    let modes = [("strict", false), ("lazy", true)];
    let shown = modes.map(|(mode, lazy)| show(directory, mode, lazy, progress));
    Ok(SoftDemoReport { modes: shown.into_iter().collect::<Result<_>>()? })
}

fn show(directory: &Path, mode: &'static str, lazy: bool, progress: &dyn Fn(&str)) -> Result<Shown> {
    let backend = Backend::start::<&str>(&[])?;
    let mut config = GuestConfig::default();
    config.driver.fresh_buffers = true;
    let mut guest = SoftGuest::boot(&backend, config)?;
    progress(&format!("{mode}: the soft guest is up, and draws"));
    let screens = [screen(&mut guest)?, screen(&mut guest)?];
    let cursor = cursor(&mut guest)?;
    for frame in 0..FRAMES {
        draw(&mut guest, &screens[frame as usize % 2], frame, lazy)?;
        guest.driver.cursor_ok(&Command::move_cursor(0, (frame * 4, frame * 3), cursor.resource))?;
        take_buffers_away(&mut guest, lazy)?;
    }
    let wanted = pixels(FRAMES - 1);
    guest.display_must_show(&wanted)?;
    let cursor_moves = cursor_moves(&guest)?;
    let picture = directory.join(format!("mirrorgpu-soft-{mode}.png"));
    write_png(&picture, &wanted)?;
    progress(&format!("{mode}: every pixel of frame {} is right: {}", FRAMES - 1, picture.display()));
    guest.driver.ok(&Command::set_scanout(0, 0, Default::default()))?;
    for surface in screens.into_iter().chain([cursor]) {
        guest.free(surface)?;
    }
    guest.dma.flush()?;
    let frames_clean = guest.dma.oracle().check()?;
    progress(&format!("{mode}: {frames_clean} pages were taken away; none was touched after its ack"));
    Ok(Shown { mode, picture, frames: FRAMES, cursor_moves, frames_clean, stats: backend.stats()? })
}

fn screen(guest: &mut SoftGuest) -> Result<Surface> {
    guest.surface(Format::B8G8R8X8, SIZE.0, SIZE.1)
}

fn cursor(guest: &mut SoftGuest) -> Result<Surface> {
    let surface = guest.surface(Format::B8G8R8A8, 64, 64)?;
    surface.buffer.write(0, &picture::cursor())?;
    guest.driver.ok(&Command::transfer(surface.resource, surface.rect(), 0))?;
    guest.driver.cursor_ok(&Command::update_cursor(0, (0, 0), surface.resource, (0, 0)))?;
    Ok(surface)
}

/// One page flip. A lazy guest flushes its whole domain now and then, whatever is running.
fn draw(guest: &mut SoftGuest, screen: &Surface, frame: u32, lazy: bool) -> Result<()> {
    screen.buffer.write(0, &picture::whole(SIZE.0, SIZE.1, frame))?;
    let bands = (0..PASSES * BANDS).map(|i| guest.driver.submit(&transfer_of_band(screen, i % BANDS)));
    for (i, band) in bands.collect::<Result<Vec<_>>>()?.into_iter().enumerate() {
        if lazy && frame.is_multiple_of(FLUSH_EVERY) && i == BANDS as usize {
            // The first pass is done, so the device has all translations; the next is in progress, more or less.
            let pause = Duration::from_micros(u64::from(frame * 37 % 400));
            wire::wait_readable(&[], Some(pause)).map_err(Error::io("wait"))?;
            guest.dma.flush()?;
        }
        guest.driver.wait_ok(band)?;
    }
    guest.driver.ok(&Command::set_scanout(0, screen.resource, screen.rect()))?;
    guest.driver.ok(&Command::flush(screen.resource, screen.rect()))?;
    Ok(())
}

fn transfer_of_band(screen: &Surface, band: u32) -> Command {
    let height = screen.height / BANDS;
    let rect = Rect { x: 0, y: band * height, width: screen.width, height };
    Command::transfer(screen.resource, rect, u64::from(rect.y) * u64::from(screen.width) * 4)
}

/// The buffers of commands that were answered are unmapped: at once, or with the next flush.
fn take_buffers_away(guest: &mut SoftGuest, lazy: bool) -> Result<()> {
    for buffer in guest.driver.spent_buffers() {
        if lazy {
            guest.dma.unmap_later(buffer)?;
        } else {
            guest.dma.unmap(buffer)?;
        }
    }
    debug_assert_eq!(guest.driver.ring(Queue::Control).in_flight(), 0);
    Ok(())
}

fn pixels(frame: u32) -> Vec<u32> {
    let bytes = picture::whole(SIZE.0, SIZE.1, frame);
    bytes.chunks_exact(4).map(|pixel| u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0])).collect()
}

fn cursor_moves(guest: &SoftGuest) -> Result<u64> {
    let display = guest.display.as_ref().ok_or(Error::Closed { what: "there was no display" })?;
    // Moves coalesce on the way; the last one arrives.
    let last = ((FRAMES - 1) * 4, (FRAMES - 1) * 3);
    display.wait(Duration::from_secs(5), |seen| seen.cursor.at == last);
    Ok(display.seen().cursor_moves)
}

fn write_png(path: &Path, pixels: &[u32]) -> Result<()> {
    let bytes: Vec<u8> =
        pixels.iter().flat_map(|pixel| [pixel >> 16, pixel >> 8, *pixel]).map(|byte| byte as u8).collect();
    let failed = |what: &str| Error::io(format!("{what} {}", path.display()));
    let file = File::create(path).map_err(failed("create"))?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| {
        writer.write_image_data(&bytes)?;
        writer.finish()
    });
    written.map_err(std::io::Error::from).map_err(failed("write"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_comes_back_from_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("picture.png");
        let wanted = pixels(7);
        write_png(&path, &wanted).unwrap();
        let file = std::io::BufReader::new(File::open(&path).unwrap());
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut bytes).unwrap();
        let back = bytes.chunks_exact(3).map(|rgb| u32::from_be_bytes([0, rgb[0], rgb[1], rgb[2]]));
        assert!(back.eq(wanted));
    }
}
