//! The other end of the display socket, which is QEMU's console: answers what the back-end asks, and collects what it
//! shows (QEMU, interop/vhost-user-gpu). Can be slow, silent or dead. Knows x8r8g8b8, not resources.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::error::{Error, Result};
use super::gpu::{HEADER_LEN, Rect, kind};
use super::turn::held;
use super::wire::{self, Message, REPLY};

/// Messages of the display protocol.
mod message {
    pub(super) const GET_PROTOCOL_FEATURES: u32 = 1;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 2;
    pub(super) const GET_DISPLAY_INFO: u32 = 3;
    pub(super) const CURSOR_POS: u32 = 4;
    pub(super) const CURSOR_POS_HIDE: u32 = 5;
    pub(super) const CURSOR_UPDATE: u32 = 6;
    pub(super) const SCANOUT: u32 = 7;
    pub(super) const UPDATE: u32 = 8;
    pub(super) const GET_EDID: u32 = 11;
}

/// Maximum number of scanouts of a display.
pub const SCANOUTS: usize = 16;

/// How a display behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// At once.
    Prompt,
    /// Each message after this time.
    Slow(Duration),
    /// Reads nothing and answers nothing.
    Silent,
    /// Closes the socket at once.
    Dead,
}

/// What one scanout shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Screen {
    /// Width in pixels; 0: switched off.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Pixels 0x00RRGGBB, row by row. What was never drawn is [`NEVER_DRAWN`].
    pub pixels: Vec<u32>,
}

/// A pixel that no UPDATE has touched.
pub const NEVER_DRAWN: u32 = 0xdead_beef;

impl Screen {
    /// Compares with a picture of `0x00RRGGBB`, and names the first pixel that differs.
    pub fn must_show(&self, picture: &[u32]) -> Result<()> {
        for (i, (&got, &wanted)) in self.pixels.iter().zip(picture).enumerate() {
            let (x, y) = (i as u32 % self.width, i as u32 / self.width);
            if got != wanted {
                return Err(Error::Picture { x, y, got, wanted });
            }
        }
        let (x, y) = (self.width, self.height);
        let sizes = (self.pixels.len() as u32, picture.len() as u32);
        if sizes.0 == sizes.1 { Ok(()) } else { Err(Error::Picture { x, y, got: sizes.0, wanted: sizes.1 }) }
    }
}

/// The cursor, as it was last shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Scanout.
    pub scanout: u32,
    /// Position.
    pub at: (u32, u32),
    /// Hot spot.
    pub hot: (u32, u32),
    /// Whether it is shown.
    pub visible: bool,
    /// 64 × 64 pixels, a8r8g8b8.
    pub pixels: Vec<u32>,
}

/// What a display has seen so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// What is shown.
    pub screens: Vec<Screen>,
    /// The cursor.
    pub cursor: Cursor,
    /// SCANOUT messages.
    pub scanouts: u64,
    /// UPDATE messages.
    pub updates: u64,
    /// CURSOR_UPDATE messages.
    pub cursor_updates: u64,
    /// CURSOR_POS and CURSOR_POS_HIDE messages.
    pub cursor_moves: u64,
    /// Questions that were answered.
    pub questions: u64,
    /// Malformed messages, described.
    pub nonsense: Vec<String>,
    /// Whether the back-end has closed the socket.
    pub closed: bool,
}

type Shared = Arc<(Mutex<Seen>, Condvar)>;

/// A display.
#[derive(Debug)]
pub struct Display {
    shared: Shared,
    theirs: UnixStream,
    ours: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// A display whose preferred mode is `width` × `height` on scanout 0.
    pub fn new(manner: Manner, width: u32, height: u32) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("make a socket pair"))?;
        let seen = Seen { screens: vec![Screen::default(); SCANOUTS], ..Seen::default() };
        let shared: Shared = Arc::new((Mutex::new(seen), Condvar::new()));
        if manner == Manner::Dead {
            ours.shutdown(std::net::Shutdown::Both).map_err(Error::io("shut a socket down"))?;
        }
        let thread = if matches!(manner, Manner::Prompt | Manner::Slow(_)) {
            let socket = ours.try_clone().map_err(Error::io("duplicate a socket"))?;
            let shared = shared.clone();
            let body = move || serve(&socket, &shared, manner, (width, height));
            Some(
                thread::Builder::new()
                    .name("display".into())
                    .spawn(body)
                    .map_err(Error::io("start a thread"))?,
            )
        } else {
            None
        };
        Ok(Self { shared, theirs, ours, thread })
    }

    /// The end that goes to the back-end.
    pub fn socket(&self) -> &UnixStream {
        &self.theirs
    }

    /// What was seen so far.
    pub fn seen(&self) -> Seen {
        held(&self.shared.0).clone()
    }

    /// Waits until what was seen satisfies `until`; returns whether it did within `timeout`.
    pub fn wait(&self, timeout: Duration, until: impl Fn(&Seen) -> bool) -> bool {
        let waiting = |seen: &mut Seen| !until(seen);
        let waited = self.shared.1.wait_timeout_while(held(&self.shared.0), timeout, waiting);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits until a scanout shows this picture; after `timeout`, names the first pixel that differs.
    pub fn must_show(&self, scanout: usize, picture: &[u32], timeout: Duration) -> Result<()> {
        self.wait(timeout, |seen| seen.screens[scanout].must_show(picture).is_ok());
        self.seen().screens[scanout].must_show(picture)
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        // Fails if the back-end has closed its end: then the thread is already ending.
        let _ = self.ours.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // A panic here would hide the one that ended the test.
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UnixStream, shared: &Shared, manner: Manner, mode: (u32, u32)) {
    while let Ok(Some(message)) = wire::receive(socket) {
        if let Manner::Slow(time) = manner {
            thread::sleep(time);
        }
        let mut seen = held(&shared.0);
        if let Some(reply) = look_at(&mut seen, &message, mode) {
            seen.questions += 1;
            if wire::send(socket, message.request, REPLY, &reply, &[]).is_err() {
                break;
            }
        }
        shared.1.notify_all();
    }
    held(&shared.0).closed = true;
    shared.1.notify_all();
}

fn look_at(seen: &mut Seen, message: &Message, mode: (u32, u32)) -> Option<Vec<u8>> {
    let understood = match message.request {
        message::GET_PROTOCOL_FEATURES => return Some(1_u64.to_le_bytes().to_vec()),
        message::GET_DISPLAY_INFO => return Some(display_info(mode)),
        message::GET_EDID => return Some(edid()),
        message::SET_PROTOCOL_FEATURES => Some(()),
        message::SCANOUT => scanout(seen, &message.body),
        message::UPDATE => update(seen, &message.body),
        message::CURSOR_POS => cursor_position(seen, &message.body, true),
        message::CURSOR_POS_HIDE => cursor_position(seen, &message.body, false),
        message::CURSOR_UPDATE => cursor_update(seen, &message.body),
        _ => None,
    };
    if understood.is_none() {
        seen.nonsense.push(format!("request {} with {} bytes", message.request, message.body.len()));
    }
    None
}

fn words<const N: usize>(body: &[u8]) -> Option<([u32; N], &[u8])> {
    let (head, rest) = body.split_at_checked(4 * N)?;
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(head.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().ok()?);
    }
    Some((words, rest))
}

fn pixels(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn scanout(seen: &mut Seen, body: &[u8]) -> Option<()> {
    let ([scanout, width, height], []) = words(body)? else { return None };
    let pixels = vec![NEVER_DRAWN; width as usize * height as usize];
    *seen.screens.get_mut(scanout as usize)? = Screen { width, height, pixels };
    seen.scanouts += 1;
    Some(())
}

fn update(seen: &mut Seen, body: &[u8]) -> Option<()> {
    let ([scanout, x, y, width, height], data) = words(body)?;
    let screen = seen.screens.get_mut(scanout as usize)?;
    let rect = Rect { x, y, width, height };
    let fits = u64::from(x) + u64::from(width) <= u64::from(screen.width)
        && u64::from(y) + u64::from(height) <= u64::from(screen.height);
    if !fits || data.len() as u64 != u64::from(width) * u64::from(height) * 4 {
        return None;
    }
    for (i, pixel) in pixels(data).enumerate() {
        let (column, row) = (i as u32 % rect.width + rect.x, i as u32 / rect.width + rect.y);
        screen.pixels[(row * screen.width + column) as usize] = pixel & 0xff_ffff;
    }
    seen.updates += 1;
    Some(())
}

fn cursor_position(seen: &mut Seen, body: &[u8], visible: bool) -> Option<()> {
    let ([scanout, x, y], []) = words(body)? else { return None };
    let cursor = &mut seen.cursor;
    (cursor.scanout, cursor.at, cursor.visible) = (scanout, (x, y), visible);
    seen.cursor_moves += 1;
    Some(())
}

fn cursor_update(seen: &mut Seen, body: &[u8]) -> Option<()> {
    let ([scanout, x, y, hot_x, hot_y], data) = words(body)?;
    if data.len() != 64 * 64 * 4 {
        return None;
    }
    let (at, hot, pixels) = ((x, y), (hot_x, hot_y), pixels(data).collect());
    seen.cursor = Cursor { scanout, at, hot, visible: true, pixels };
    seen.cursor_updates += 1;
    Some(())
}

fn header(kind: u32) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.resize(HEADER_LEN, 0);
    bytes
}

fn display_info((width, height): (u32, u32)) -> Vec<u8> {
    let mut bytes = header(kind::OK_DISPLAY_INFO);
    for scanout in 0..SCANOUTS {
        let mode = if scanout == 0 { [0, 0, width, height, 1, 0] } else { [0; 6] };
        bytes.extend(mode.iter().flat_map(|word: &u32| word.to_le_bytes()));
    }
    bytes
}

/// Bytes of the EDID that this display returns: recognisable, if not a monitor.
pub const EDID: [u8; 128] = [0x4d; 128];

fn edid() -> Vec<u8> {
    let mut bytes = header(kind::OK_EDID);
    bytes.extend((EDID.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(EDID);
    bytes.resize(HEADER_LEN + 8 + 1024, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(display: &Display, request: u32, words: &[u32], data: &[u8]) {
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        body.extend(data);
        wire::send(display.socket(), request, 0, &body, &[]).unwrap();
    }

    #[test]
    fn what_is_sent_is_shown_and_what_makes_no_sense_is_noted() {
        let display = Display::new(Manner::Prompt, 640, 480).unwrap();
        send(&display, message::SCANOUT, &[1, 4, 2], &[]);
        send(&display, message::UPDATE, &[1, 1, 1, 2, 1], &[1, 2, 3, 255, 4, 5, 6, 0]);
        send(&display, message::UPDATE, &[1, 3, 1, 2, 1], &[0; 8]);
        assert!(display.wait(Duration::from_secs(10), |seen| seen.nonsense.len() == 1));
        let screen = &display.seen().screens[1];
        let blank = NEVER_DRAWN;
        screen.must_show(&[blank, blank, blank, blank, blank, 0x030201, 0x060504, blank]).unwrap();
        let wrong = screen.must_show(&[blank, 0]).unwrap_err();
        assert!(matches!(wrong, Error::Picture { x: 1, y: 0, got: NEVER_DRAWN, wanted: 0 }), "{wrong}");
    }

    #[test]
    fn questions_are_answered() {
        let display = Display::new(Manner::Prompt, 640, 480).unwrap();
        send(&display, message::GET_DISPLAY_INFO, &[], &[]);
        let reply = wire::receive(display.socket()).unwrap().unwrap();
        assert_eq!((reply.request, reply.flags, reply.body.len()), (3, REPLY, 408));
        assert_eq!(words::<4>(&reply.body[HEADER_LEN..]).unwrap().0, [0, 0, 640, 480]);
    }
}
