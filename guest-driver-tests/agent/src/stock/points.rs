//! Jobs that wait for fences of jobs: merged sync_files, points of a timeline that nobody has submitted yet, eventfds.
//! Knows syncobjs by way of the `drm` crate; knows nothing of how the driver waits.

use super::client::{Client, LIMIT, PageState, With};
use crate::error::{AgentError, Doing};
use crate::virtgpu::{SyncFile, SyncPoint};
use drm::control::{Device as _, syncobj};
use guest_agent::stock_words::{Points, Until};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

/// linux: include/uapi/linux/sync_file.h, SYNC_IOC_MERGE.
const MERGE: u32 = 3 << 30 | (size_of::<Merge>() as u32) << 16 | (b'>' as u32) << 8 | 3;
/// For what must not come.
const PATIENCE: Duration = Duration::from_millis(100);

#[repr(C)]
#[derive(Default)]
struct Merge {
    name: [u8; 32],
    second: i32,
    merged: i32,
    flags: u32,
    pad: u32,
}

/// Tries all of it.
pub(super) fn run() -> Result<Points, AgentError> {
    let (mut first, mut second) = (Client::open()?, Client::open()?);
    let timelines = first.ring.is_some();
    let merged = merged(&mut first, &mut second)?;
    let points = Points { timelines, merged, ..Points::default() };
    let Ok(timeline) = first.node.create_syncobj(false) else {
        return Ok(Points { done: done(&first) + done(&second), ..points });
    };
    let points = on_timeline(&mut first, timeline, points)?;
    let held_back = behind_point(&mut first, &mut second, timeline)?;
    first.node.destroy_syncobj(timeline).doing("destroy a syncobj")?;
    Ok(Points { offered: true, held_back, done: done(&first) + done(&second), ..points })
}

/// A merged fence comes with the later of its two.
fn merged(first: &mut Client, second: &mut Client) -> Result<bool, AgentError> {
    first.submit(Until::Told)?;
    second.submit(Until::Told)?;
    let both = match (first.fences(), second.fences()) {
        ([a], [b]) => merge(a, b).doing("merge two fences")?,
        _ => return Err(AgentError::NothingBegun),
    };
    let early = both.is_signalled(PATIENCE)?;
    first.tell(1);
    first.wait_end()?;
    let half = both.is_signalled(PATIENCE)?;
    second.tell(1);
    second.wait_end()?;
    Ok(!early && !half && both.is_signalled(LIMIT)?)
}

/// A wait for the second point of a timeline, before anybody is to signal it; and an eventfd.
fn on_timeline(client: &mut Client, timeline: syncobj::Handle, points: Points) -> Result<Points, AgentError> {
    let eventfd = eventfd().doing("make an eventfd")?;
    client
        .node
        .syncobj_eventfd(timeline, 2, eventfd.as_fd(), false)
        .doing("have an eventfd told of a point")?;
    let told = || crate::port::wait_readable(eventfd.as_fd(), PATIENCE).doing("look at an eventfd");
    let deadline = deadline()?;
    let waiter = client.node.clone();
    let waiter =
        thread::spawn(move || waiter.syncobj_timeline_wait(&[timeline], &[2], deadline, true, true, false));
    thread::sleep(PATIENCE);
    let mut stood = !waiter.is_finished() && !told()?;
    let at = |point| SyncPoint { handle: timeline.into(), flags: 0, point };
    let number = client.submit_with(Until::Told, &With { signals: &[at(1)], ..With::default() })?;
    client.submit_with(Until::Told, &With { signals: &[at(2)], ..With::default() })?;
    let mut counted = stands_at(client, timeline)? == 0;
    client.tell(number);
    super::client::wait_for("the first point of a timeline", || {
        stands_at(client, timeline).is_ok_and(|at| at == 1)
    })?;
    stood &= !told()? && !waiter.is_finished();
    client.tell(number + 1);
    client.wait_end()?;
    let came = waiter.join().is_ok_and(|result| result.is_ok());
    counted &= stands_at(client, timeline)? == 2;
    Ok(Points { waited_before_submit: stood && came, eventfd: stood && told()?, counted, ..points })
}

/// A job of another context is to wait for a point: whether it does.
fn behind_point(
    first: &mut Client,
    second: &mut Client,
    timeline: syncobj::Handle,
) -> Result<bool, AgentError> {
    let point = SyncPoint { handle: timeline.into(), flags: 0, point: 3 };
    let number = first.submit_with(Until::Told, &With { signals: &[point], ..With::default() })?;
    first.wait_begun(number)?;
    // Syncobjs are a node's: what they hold goes over as a file.
    let file = first.node.create_syncobj(false).doing("make a syncobj")?;
    first.node.syncobj_timeline_transfer(timeline, file, 3, 0).doing("take a point of a timeline")?;
    let file = first.node.syncobj_to_fd(file, true).doing("export a point")?;
    let behind = second.next_number();
    let waiting = second.submit_aside(behind, SyncFile::from(file));
    thread::sleep(PATIENCE);
    let held_back = second.page(behind) == PageState::Poison && !waiting.is_finished();
    first.tell(number);
    second.join(waiting)?;
    first.wait_end()?;
    second.wait_end()?;
    Ok(held_back)
}

fn stands_at(client: &Client, timeline: syncobj::Handle) -> Result<u64, AgentError> {
    let mut points = [0];
    client
        .node
        .syncobj_timeline_query(&[timeline], &mut points, false)
        .doing("ask where a timeline stands")?;
    Ok(points[0])
}

fn done(client: &Client) -> u32 {
    let numbers = 1..client.next_number();
    numbers.filter(|number| client.is_done(*number) && client.page(*number) == PageState::Filled).count()
        as u32
}

fn merge(first: &SyncFile, second: &SyncFile) -> io::Result<SyncFile> {
    let mut request = Merge { second: second.as_fd().as_raw_fd(), ..Merge::default() };
    // SAFETY: `request` is the struct of this ioctl, and outlives the call.
    if unsafe { libc::ioctl(first.as_fd().as_raw_fd(), MERGE.into(), &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the ioctl has opened it, for us alone.
    Ok(SyncFile::from(unsafe { OwnedFd::from_raw_fd(request.merged) }))
}

fn eventfd() -> io::Result<File> {
    // SAFETY: takes no pointer.
    match unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the call has opened it, for us alone.
        file => Ok(unsafe { File::from_raw_fd(file) }),
    }
}

/// Until when a wait that does not end is borne with, on the clock of syncobjs.
fn deadline() -> Result<i64, AgentError> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a timespec to write to.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) } < 0 {
        return Err(io::Error::last_os_error()).doing("read the clock");
    }
    Ok((now.tv_sec + LIMIT.as_secs() as i64) * 1_000_000_000 + now.tv_nsec)
}
