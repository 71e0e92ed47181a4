//! Commands of both queues, with engines, a display and resets around them: the input becomes a script, and
//! `device_model::testing::script` plays it and says what has to hold.

use arbitrary::{Result, Unstructured};
use device_model::gpu::scanout::CursorPosition;
use device_model::image::Rect;
use device_model::testing::noise::noise;
use device_model::testing::requests as command;
use device_model::testing::script::{Action, play};

use crate::input::{long, number, stream};

/// Most actions of a script.
const ACTIONS: usize = 400;
/// Most packets of a job.
const PACKETS: usize = 6;

/// Plays `bytes`.
pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let mut actions = Vec::new();
    while !u.is_empty() && actions.len() < ACTIONS {
        // An input that ends within an action has one action less.
        let Ok(next) = action(&mut u) else { break };
        actions.push(next);
    }
    play(actions);
}

fn action(u: &mut Unstructured<'_>) -> Result<Action> {
    Ok(match u.int_in_range(0..=31)? {
        0 => Action::Reset(u.arbitrary()?),
        1 => Action::Answer(u.int_in_range(0..=2)?),
        2..=3 => Action::Step(u.arbitrary::<u16>()?.into()),
        4..=5 => Action::Finish(u.int_in_range(0..=2)?, u.arbitrary()?),
        6..=8 => Action::Run(u.int_in_range(0..=2)?),
        9..=11 => Action::Cursor(dressed(u, cursor)?),
        12 => Action::Cursor(dressed(u, control)?),
        _ => Action::Control(dressed(u, control)?),
    })
}

/// A command with a fence, on a ring, or cut off, or none of these.
fn dressed(
    u: &mut Unstructured<'_>,
    build: impl FnOnce(&mut Unstructured<'_>) -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let how: u8 = u.arbitrary()?;
    let mut request = build(u)?;
    // What is shorter than a header can carry nothing.
    if request.len() >= command::HEADER {
        if how & 1 != 0 {
            request = command::fenced(request, u64::from(how));
        }
        if how & 2 != 0 {
            request = command::on_ring(request, if how & 4 == 0 { how >> 7 } else { u.arbitrary()? });
        }
    }
    if how & 0x38 == 0x38 {
        request.truncate(u.arbitrary::<u16>()?.into());
    }
    Ok(request)
}

fn cursor(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let position = CursorPosition { scanout: number(u)?, x: number(u)?, y: number(u)? };
    Ok(match u.arbitrary()? {
        true => command::update_cursor(position, number(u)?, (number(u)?, number(u)?)),
        false => command::move_cursor(position, number(u)?),
    })
}

fn control(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Ok(match u.int_in_range(0..=30)? {
        0 => command::get_display_info(),
        1 => command::get_edid(number(u)?),
        2..=3 => command::create_2d(id(u)?, format(u)?, side(u)?, side(u)?),
        4 => command::unref(id(u)?),
        5..=6 => command::attach_backing(id(u)?, &entries(u)?),
        7 => command::attach_backing_claiming(id(u)?, number(u)?, &entries(u)?),
        8 => command::detach_backing(id(u)?),
        9 => command::set_scanout(number(u)?, id(u)?, rect(u)?),
        10 => command::transfer_to_host_2d(id(u)?, rect(u)?, long(u)?),
        11 => command::flush(id(u)?, rect(u)?),
        12 => command::get_capset_info(number(u)?),
        13 => command::get_capset(number(u)?, number(u)?),
        14 => command::ctx_create_for(context(u)?, if u.ratio(1, 4)? { number(u)? } else { 0 }),
        15 => command::ctx_destroy(context(u)?),
        16..=17 => command::ctx_attach(context(u)?, id(u)?),
        18 => command::ctx_detach(context(u)?, id(u)?),
        19 => command::create_3d(id(u)?, u32::from(u.ratio(1, 8)?), bytes(u)?, 1),
        20 => blob(u)?,
        21 => command::transfer_3d(u.arbitrary()?, context(u)?, id(u)?, number(u)?, number(u)?),
        22..=23 => job(u)?,
        24 => command::set_scanout_blob(id(u)?),
        25..=26 => {
            let flags = u32::from(u.ratio(1, 16)?);
            command::as_create_with(context(u)?, asid(u)?, flags, u64::from(u.arbitrary::<u8>()?) << 12)
        }
        27 => command::as_destroy(context(u)?, asid(u)?),
        29 => match u.arbitrary::<bool>()? {
            true => command::as_fetch_fault(context(u)?, asid(u)?),
            false => command::as_answer_fault(
                context(u)?,
                asid(u)?,
                u.int_in_range(0..=2)?,
                u.int_in_range(0..=3)?,
            ),
        },
        28 => command::as_invalidate(
            context(u)?,
            asid(u)?,
            u.int_in_range(0..=2)?,
            (u.arbitrary()?, u.arbitrary()?),
        ),
        _ => any_bytes(u)?,
    })
}

fn blob(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let whose = if u.ratio(1, 8)? { (number(u)?, long(u)?) } else { (1, 0) };
    Ok(command::create_blob_of(whose, id(u)?, bytes(u)?.into(), &entries(u)?))
}

fn job(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let ctx = context(u)?;
    let words = stream(u, PACKETS)?;
    let stream: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    Ok(if u.ratio(1, 16)? {
        command::submit_3d_claiming(ctx, number(u)?, &stream)
    } else {
        command::submit_3d(ctx, &stream)
    })
}

/// A command of any number and any bytes.
fn any_bytes(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let len = u.int_in_range(0..=80)?;
    let bytes = u.bytes(len)?;
    Ok(if u.arbitrary()? {
        bytes.to_vec()
    } else {
        command::raw(
            if u.ratio(1, 4)? { u.int_in_range(0x4d00..=0x4dff)? } else { u.int_in_range(0x100..=0x30f)? },
            bytes,
        )
    })
}

fn id(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 16)? { number(u) } else { u.int_in_range(1..=5) }
}

fn asid(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 16)? { number(u) } else { u.int_in_range(1..=2) }
}

fn context(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 16)? { number(u) } else { u.int_in_range(1..=2) }
}

fn format(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 16)? { number(u) } else { Ok(*u.choose(&command::FORMATS)?) }
}

/// A side of a picture: most often that of a cursor.
fn side(u: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match u.int_in_range(0..=7)? {
        0 => number(u)?,
        1..=3 => u.int_in_range(1..=70)?,
        _ => 64,
    })
}

fn bytes(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 8)? { number(u) } else { Ok(u32::from(u.arbitrary::<u8>()?) * 0x40) }
}

fn rect(u: &mut Unstructured<'_>) -> Result<Rect> {
    if u.arbitrary()? {
        return Ok(Rect { x: 0, y: 0, width: 64, height: 64 });
    }
    Ok(Rect { x: number(u)?, y: number(u)?, width: side(u)?, height: side(u)? })
}

/// Entries of a backing; most lie in the memory that a script has.
fn entries(u: &mut Unstructured<'_>) -> Result<Vec<(u64, u32)>> {
    (0..u.int_in_range(0..=4)?)
        .map(|_| {
            let at = if u.ratio(1, 16)? { long(u)? } else { u64::from(u.arbitrary::<u16>()? & 0x7ff8) };
            Ok((at, bytes(u)?))
        })
        .collect()
}

/// Scripts to begin with.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    noise(6, 1500)
}
