//! The display against a front-end that the test plays on the other end of a socket pair.

use std::io::{Read, Write};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use device_model::gpu::scanout::{ChannelOrder, CursorPosition, DisplayMode, ScanoutSource};
use device_model::image::{Image, Rect};

use super::*;
use crate::wake::Waker;

/// Time limit of every wait in these tests.
const PATIENCE: Duration = Duration::from_secs(20);

const GET_PROTOCOL_FEATURES: u32 = 1;
const SET_PROTOCOL_FEATURES: u32 = 2;
const GET_DISPLAY_INFO: u32 = 3;
const CURSOR_POS: u32 = 4;
const CURSOR_POS_HIDE: u32 = 5;
const CURSOR_UPDATE: u32 = 6;
const SCANOUT: u32 = 7;
const UPDATE: u32 = 8;
const GET_EDID: u32 = 11;

/// The front-end's end of the display socket, with one screen.
struct FrontEnd {
    socket: UnixStream,
    screen: Vec<u8>,
    width: usize,
    height: usize,
    updates: u64,
}

impl FrontEnd {
    /// A socket pair; the second socket is for the display.
    fn new() -> (Self, UnixStream) {
        let (socket, other) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        (Self { socket, screen: Vec::new(), width: 0, height: 0, updates: 0 }, other)
    }

    /// A front-end that is connected to `display` and has negotiated `features`.
    fn connected(display: &Display, features: u64) -> Self {
        let (mut front_end, other) = Self::new();
        display.connect(other);
        assert_eq!(front_end.receive(), Some((GET_PROTOCOL_FEATURES, vec![])));
        front_end.reply(GET_PROTOCOL_FEATURES, &features.to_le_bytes());
        let accepted = (features & 1).to_le_bytes().to_vec();
        assert_eq!(front_end.receive(), Some((SET_PROTOCOL_FEATURES, accepted)));
        front_end
    }

    /// The next message; `None` at the end of the connection.
    fn receive(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut header = [0; 12];
        self.socket.read_exact(&mut header).ok()?;
        let [request, flags, size] = words(&header)[..] else { unreachable!() };
        assert_eq!(flags, 0);
        let mut body = vec![0; size as usize];
        self.socket.read_exact(&mut body).ok()?;
        Some((request, body))
    }

    fn reply(&mut self, request: u32, body: &[u8]) {
        let header = [request, 4, body.len() as u32].map(u32::to_le_bytes);
        self.socket.write_all(header.as_flattened()).unwrap();
        self.socket.write_all(body).unwrap();
    }

    /// Handles one message that changes scanout 0, as QEMU does: an UPDATE outside of a known surface is an error.
    fn draw(&mut self) {
        let (request, body) = self.receive().expect("the connection ended before the picture was right");
        match (request, &words(&body)[..]) {
            (SCANOUT, [0, width, height]) => {
                (self.width, self.height) = (*width as usize, *height as usize);
                self.screen = vec![0x55; self.width * self.height * 4];
            }
            (UPDATE, [0, x, y, width, height, ..]) => {
                let area = [x, y, width, height].map(|value| *value as usize);
                self.blit(area, &body[20..]);
            }
            (request, _) => panic!("unexpected message {request}"),
        }
    }

    fn blit(&mut self, [x, y, width, height]: [usize; 4], pixels: &[u8]) {
        assert!(x + width <= self.width && y + height <= self.height, "an UPDATE beyond its SCANOUT");
        assert_eq!(pixels.len(), width * height * 4);
        for (row, bytes) in pixels.chunks_exact(width * 4).enumerate() {
            let start = ((y + row) * self.width + x) * 4;
            self.screen[start..start + bytes.len()].copy_from_slice(bytes);
        }
        self.updates += 1;
    }

    fn draw_until(&mut self, expected: &[u8]) {
        while self.screen != expected {
            self.draw();
        }
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

type Answers = Receiver<(u64, DisplayAnswer)>;

fn no_failures() -> ThreadFailures {
    ThreadFailures::new(Waker::new().unwrap())
}

fn display(timeout: Duration) -> (Display, Arc<Stats>, Answers) {
    let stats = Arc::new(Stats::default());
    let (sender, answers) = mpsc::channel();
    let callback = move |ticket, answer| sender.send((ticket, answer)).unwrap();
    let display = Display::spawn_with_timeout(stats.clone(), &no_failures(), timeout, callback).unwrap();
    (display, stats, answers)
}

const B8G8R8X8: ChannelOrder = ChannelOrder { blue: 0, green: 1, red: 2 };

fn whole(image: &Image) -> Rect {
    Rect { x: 0, y: 0, width: image.width(), height: image.height() }
}

fn show(display: &Display, image: &Arc<Image>, order: ChannelOrder, rect: Rect) {
    let source = Some(ScanoutSource { image: image.clone(), order, rect });
    display.send(DisplayCommand::SetScanout { scanout: 0, source });
}

/// Fills an image with a pattern that differs in every pixel, and returns what a screen then shows.
fn paint(image: &Image, seed: u8) -> Vec<u8> {
    let mut pixels = image.lock();
    for (index, byte) in pixels.iter_mut().enumerate() {
        *byte = (index as u8).wrapping_mul(31) ^ (index >> 8) as u8 ^ seed;
    }
    opaque(&pixels)
}

fn opaque(pixels: &[u8]) -> Vec<u8> {
    let pixels = pixels.chunks_exact(4);
    pixels.flat_map(|pixel| [pixel[0], pixel[1], pixel[2], 255]).collect()
}

#[test]
fn a_picture_larger_than_a_message_arrives_exactly() {
    let (display, stats, _answers) = display(PATIENCE);
    let mut front_end = FrontEnd::connected(&display, 3);
    let image = Arc::new(Image::new(641, 483).unwrap());
    let expected = paint(&image, 7);
    show(&display, &image, B8G8R8X8, whole(&image));
    front_end.draw_until(&expected);
    assert!(front_end.updates > 1, "one message would have been too large");

    let changed = Rect { x: 600, y: 100, width: 41, height: 3 };
    image.lock()[(101 * 641 + 620) * 4] ^= 0xff;
    let expected = opaque(&image.lock());
    let before = front_end.updates;
    display.send(DisplayCommand::Flush { scanout: 0, rect: changed });
    front_end.draw_until(&expected);
    assert_eq!(front_end.updates, before + 1);
    assert_eq!(stats.snapshot().display_updates, front_end.updates);
    assert_eq!(stats.snapshot().flushes, 1);
}

#[test]
fn every_format_and_a_part_of_an_image_look_right() {
    let (display, _stats, _answers) = display(PATIENCE);
    let mut front_end = FrontEnd::connected(&display, 0);
    for (blue, green, red) in [(0, 1, 2), (2, 1, 0), (1, 2, 3), (3, 2, 1)] {
        let image = Arc::new(Image::new(50, 40).unwrap());
        let order = ChannelOrder { blue, green, red };
        let rect = Rect { x: 10, y: 5, width: 30, height: 20 + u32::from(blue) };
        let mut expected = Vec::new();
        for y in 0..40u8 {
            for x in 0..50u8 {
                let mut pixel = [0; 4];
                for (index, value) in [(blue, x), (green, y), (red, 200)] {
                    pixel[usize::from(index)] = value;
                }
                let start = (usize::from(y) * 50 + usize::from(x)) * 4;
                image.lock()[start..start + 4].copy_from_slice(&pixel);
                if (10..40).contains(&x) && (5..25 + blue).contains(&y) {
                    expected.extend([x, y, 200, 255]);
                }
            }
        }
        show(&display, &image, order, rect);
        front_end.draw_until(&expected);
    }
}

#[test]
fn a_slow_front_end_gets_few_updates_and_the_last_picture() {
    const FLUSHES: u64 = 1000;
    let (display, stats, _answers) = display(PATIENCE);
    let mut front_end = FrontEnd::connected(&display, 1);
    let image = Arc::new(Image::new(640, 480).unwrap());
    show(&display, &image, B8G8R8X8, whole(&image));
    let mut expected = Vec::new();
    for frame in 0..FLUSHES {
        if frame % 100 == 99 {
            expected = paint(&image, frame as u8);
        }
        display.send(DisplayCommand::Flush { scanout: 0, rect: whole(&image) });
    }
    front_end.draw_until(&expected);
    assert!(front_end.updates <= 3 * 5, "{} updates of a fifth of the screen each", front_end.updates);
    let snapshot = stats.snapshot();
    assert_eq!(snapshot.flushes, FLUSHES);
    assert!(snapshot.flushes_coalesced >= FLUSHES - 3, "{} coalesced", snapshot.flushes_coalesced);
}

#[test]
fn cursor_commands_reach_the_display() {
    let (display, stats, _answers) = display(PATIENCE);
    let mut front_end = FrontEnd::connected(&display, 1);
    let position = CursorPosition { scanout: 3, x: 20, y: 30 };
    let pixels = Box::new(std::array::from_fn(|index| index as u8));
    let expected = [3u32, 20, 30, 5, 6].iter().flat_map(|word| word.to_le_bytes()).chain(*pixels).collect();
    display.send(DisplayCommand::UpdateCursor { position, hot_x: 5, hot_y: 6, pixels });
    assert_eq!(front_end.receive(), Some((CURSOR_UPDATE, expected)));

    let place = |x: u32| [3, x, 30].map(u32::to_le_bytes).as_flattened().to_vec();
    display.send(DisplayCommand::MoveCursor(CursorPosition { x: 21, ..position }));
    assert_eq!(front_end.receive(), Some((CURSOR_POS, place(21))));
    display.send(DisplayCommand::HideCursor(CursorPosition { x: 22, ..position }));
    assert_eq!(front_end.receive(), Some((CURSOR_POS_HIDE, place(22))));
    assert_eq!((stats.cursor_updates.get(), stats.cursor_moves.get()), (2, 1));
}

/// A GET_DISPLAY_INFO reply in which the scanouts in `enabled` are enabled.
fn display_info(enabled: &[usize]) -> Vec<u8> {
    let mut reply = vec![0; 24 + 16 * 24];
    for scanout in enabled {
        let mode = [1, 2, 1280, 800, 1, 9].map(u32::to_le_bytes);
        reply[24 + 24 * scanout..][..24].copy_from_slice(mode.as_flattened());
    }
    reply
}

#[test]
fn questions_are_answered_by_the_display() {
    let (display, _stats, answers) = display(PATIENCE);
    let mut front_end = FrontEnd::connected(&display, 1);
    display.ask(11, DisplayQuery::Modes);
    assert_eq!(front_end.receive(), Some((GET_DISPLAY_INFO, vec![])));
    front_end.reply(GET_DISPLAY_INFO, &display_info(&[1]));
    let mut modes = Box::new([DisplayMode::default(); 16]);
    let rect = Rect { x: 1, y: 2, width: 1280, height: 800 };
    modes[1] = DisplayMode { rect, enabled: true, flags: 9 };
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((11, DisplayAnswer::Modes(Some(modes)))));

    display.ask(12, DisplayQuery::Edid { scanout: 0 });
    assert_eq!(front_end.receive(), Some((GET_EDID, vec![0; 4])));
    let mut reply = vec![0xcd; 24 + 8 + 1024];
    reply[24..28].copy_from_slice(&256u32.to_le_bytes());
    front_end.reply(GET_EDID, &reply);
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((12, DisplayAnswer::Edid(Some(vec![0xcd; 256])))));
}

/// QEMU does not answer a request for the EDID of a scanout that does not exist.
#[test]
fn the_edid_of_a_scanout_that_the_display_may_not_have_is_not_asked_for() {
    let (display, _stats, answers) = display(PATIENCE);
    let mut front_end = FrontEnd::connected(&display, 1);
    for (ticket, enabled) in [(1, &[0, 1][..]), (2, &[0, 2])] {
        display.ask(ticket, DisplayQuery::Edid { scanout: 2 });
        assert_eq!(front_end.receive(), Some((GET_DISPLAY_INFO, vec![])));
        front_end.reply(GET_DISPLAY_INFO, &display_info(enabled));
    }
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((1, DisplayAnswer::Edid(None))));
    assert_eq!(front_end.receive(), Some((GET_EDID, vec![2, 0, 0, 0])));
}

#[test]
fn an_edid_is_not_asked_for_if_the_display_cannot_give_one_nor_taken_if_it_is_too_long() {
    let (display, _stats, answers) = display(PATIENCE);
    let _without = FrontEnd::connected(&display, 2);
    display.ask(1, DisplayQuery::Edid { scanout: 0 });
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((1, DisplayAnswer::Edid(None))));

    let mut front_end = FrontEnd::connected(&display, 1);
    display.ask(2, DisplayQuery::Edid { scanout: 0 });
    assert_eq!(front_end.receive(), Some((GET_EDID, vec![0; 4])));
    front_end.reply(GET_EDID, &[0xff; 24 + 8 + 1024]);
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((2, DisplayAnswer::Edid(None))));
}

#[test]
fn without_a_display_questions_are_answered_with_nothing_and_pictures_wait() {
    let (display, stats, answers) = display(PATIENCE);
    display.ask(1, DisplayQuery::Modes);
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((1, DisplayAnswer::Modes(None))));
    let image = Arc::new(Image::new(8, 8).unwrap());
    let expected = paint(&image, 1);
    show(&display, &image, B8G8R8X8, whole(&image));
    for _ in 0..3 {
        display.send(DisplayCommand::Flush { scanout: 0, rect: whole(&image) });
    }
    let mut front_end = FrontEnd::connected(&display, 1);
    front_end.draw_until(&expected);
    assert_eq!((stats.flushes.get(), stats.flushes_coalesced.get()), (3, 0));
}

#[test]
fn a_silent_display_costs_a_question_its_time_and_nobody_else_anything() {
    let (display, _stats, answers) = display(Duration::from_millis(30));
    let (_silent, other) = FrontEnd::new();
    display.connect(other);
    display.ask(1, DisplayQuery::Modes);
    display.ask(2, DisplayQuery::Edid { scanout: 0 });
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((1, DisplayAnswer::Modes(None))));
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((2, DisplayAnswer::Edid(None))));

    // The display thread is still blocked on the silent socket: a new connection unblocks it.
    let mut front_end = FrontEnd::connected(&display, 1);
    let image = Arc::new(Image::new(8, 8).unwrap());
    let expected = paint(&image, 1);
    show(&display, &image, B8G8R8X8, whole(&image));
    front_end.draw_until(&expected);
    assert!(answers.try_recv().is_err(), "a query was answered twice");
}

#[test]
fn an_answer_that_comes_too_late_is_dropped_and_the_display_lives_on() {
    let (display, _stats, answers) = display(Duration::from_millis(30));
    let mut front_end = FrontEnd::connected(&display, 1);
    display.ask(1, DisplayQuery::Modes);
    assert_eq!(front_end.receive(), Some((GET_DISPLAY_INFO, vec![])));
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((1, DisplayAnswer::Modes(None))));
    front_end.reply(GET_DISPLAY_INFO, &display_info(&[0]));
    let image = Arc::new(Image::new(8, 8).unwrap());
    let expected = paint(&image, 1);
    show(&display, &image, B8G8R8X8, whole(&image));
    front_end.draw_until(&expected);
    assert!(answers.try_recv().is_err(), "the query was answered twice");
}

/// Dropping the last handle joins both threads: if it returns, neither leaks.
#[test]
fn the_threads_end_though_the_display_is_silent_or_does_not_read() {
    for negotiates in [false, true] {
        let (display, _stats, _answers) = display(PATIENCE);
        let (mut front_end, other) = FrontEnd::new();
        other.set_nonblocking(true).unwrap();
        display.connect(other);
        if negotiates {
            front_end.reply(GET_PROTOCOL_FEATURES, &[0; 8]);
        }
        assert_eq!(front_end.receive(), Some((GET_PROTOCOL_FEATURES, vec![])));
        let image = Arc::new(Image::new(1000, 1000).unwrap());
        show(&display, &image, B8G8R8X8, whole(&image));
        display.ask(1, DisplayQuery::Modes);
        let (done, ended) = mpsc::channel();
        thread::spawn(move || {
            drop(display);
            done.send(()).unwrap();
        });
        assert_eq!(ended.recv_timeout(PATIENCE), Ok(()));
    }
}

#[test]
fn a_display_that_vanishes_or_talks_nonsense_is_replaced_by_the_next() {
    let (display, _stats, answers) = display(PATIENCE);
    let image = Arc::new(Image::new(300, 200).unwrap());
    let expected = paint(&image, 3);
    show(&display, &image, B8G8R8X8, whole(&image));
    drop(FrontEnd::connected(&display, 1));
    let (mut nonsense, other) = FrontEnd::new();
    display.connect(other);
    nonsense.reply(GET_EDID, &[0; 8]);
    display.ask(1, DisplayQuery::Modes);
    assert_eq!(answers.recv_timeout(PATIENCE), Ok((1, DisplayAnswer::Modes(None))));
    for _ in 0..2 {
        let mut front_end = FrontEnd::connected(&display, 1);
        front_end.draw_until(&expected);
    }
}

#[test]
fn after_a_reset_nothing_is_shown_and_no_old_question_is_answered() {
    let (display, _stats, answers) = display(PATIENCE);
    let mut front_end = FrontEnd::connected(&display, 1);
    let image = Arc::new(Image::new(8, 8).unwrap());
    let expected = paint(&image, 1);
    show(&display, &image, B8G8R8X8, whole(&image));
    front_end.draw_until(&expected);
    display.ask(1, DisplayQuery::Modes);
    assert_eq!(front_end.receive(), Some((GET_DISPLAY_INFO, vec![])));
    display.reset();
    front_end.reply(GET_DISPLAY_INFO, &display_info(&[0]));
    assert_eq!(front_end.receive(), Some((SCANOUT, vec![0; 12])));
    assert!(answers.try_recv().is_err());
    assert_eq!(Arc::strong_count(&image), 1, "the display keeps an image that nobody shows");
}

#[test]
fn a_display_thread_that_panics_is_reported_and_the_display_still_ends() {
    let failures = no_failures();
    let callback = |_, _| panic!("the device has gone");
    let display = Display::spawn_with_timeout(Arc::default(), &failures, PATIENCE, callback).unwrap();
    display.ask(1, DisplayQuery::Modes);
    let start = Instant::now();
    while failures.first().is_none() {
        assert!(start.elapsed() < PATIENCE, "nothing was reported");
        thread::yield_now();
    }
    let failure = failures.first().unwrap().to_string();
    assert_eq!(failure, "Thread display has panicked: the device has gone");
    drop(display);
}
