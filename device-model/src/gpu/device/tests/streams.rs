//! Random streams of commands: valid, truncated, hostile. Every pending command is returned exactly once.

use job_stream::{At, Context, Space, Stream};
use proptest::prelude::*;

use super::*;
use crate::gpu::scanout::CursorPosition;
use crate::testing::script::{Action, play};

fn id() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 0_u32..4, 1 => any::<u32>()]
}

fn some_rect() -> impl Strategy<Value = Rect> {
    let number = || prop_oneof![8 => 0_u32..70, 1 => any::<u32>()];
    (number(), number(), number(), number()).prop_map(|(x, y, width, height)| rect(x, y, width, height))
}

/// Commands of contexts; some of them name rings.
fn job_command() -> impl Strategy<Value = Vec<u8>> {
    let place = |id, address| At::new(Space::resource(id), address);
    let stream = (1_u32..4, prop::option::of(1_u32..4), 0_u64..0x100).prop_map(move |(id, fence, at)| {
        let fence = fence.map(|id| place(id, 0));
        let context = Context { mode: None, priority: None, fence, done: 1, failed: 2 };
        Stream::new().push(context).fill(place(id, at).range(8), 7).finish_bytes()
    });
    let context = || 1_u32..3;
    let command = prop_oneof![
        1 => context().prop_map(ctx_create),
        1 => context().prop_map(ctx_destroy),
        3 => (context(), id()).prop_map(|(ctx, id)| ctx_attach(ctx, id)),
        1 => (context(), id()).prop_map(|(ctx, id)| ctx_detach(ctx, id)),
        3 => id().prop_map(|id| create_buffer(id, 0x100)),
        1 => (context(), id()).prop_map(|(ctx, id)| transfer_3d(true, ctx, id, 0, 8)),
        6 => (context(), stream).prop_map(|(ctx, stream)| submit_3d(ctx, &stream)),
    ];
    (command, prop::option::of(prop_oneof![4 => 0_u8..2, 1 => any::<u8>()])).prop_map(|(request, ring)| {
        match ring {
            Some(ring) => on_ring(request, ring),
            None => request,
        }
    })
}

fn control() -> impl Strategy<Value = Vec<u8>> {
    let side = || prop_oneof![6 => Just(64_u32), 3 => 0_u32..70, 1 => any::<u32>()];
    let entry = (
        prop_oneof![4 => 0_u64..0x10_000, 1 => any::<u64>()],
        prop_oneof![4 => 0_u32..9000, 1 => any::<u32>()],
    );
    let format = prop_oneof![8 => prop::sample::select(&FORMATS[..]), 1 => any::<u32>()];
    let valid = prop_oneof![
        Just(get_display_info()),
        id().prop_map(get_edid),
        (id(), format, side(), side())
            .prop_map(|(id, format, width, height)| create_2d(id, format, width, height)),
        id().prop_map(unref),
        (id(), prop::collection::vec(entry.clone(), 0..6))
            .prop_map(|(id, entries)| attach_backing(id, &entries)),
        (id(), any::<u32>()).prop_map(|(id, count)| attach_backing_claiming(id, count, &[(0, 64)])),
        id().prop_map(detach_backing),
        (id(), id(), some_rect()).prop_map(|(scanout, id, rect)| set_scanout(scanout, id, rect)),
        (id(), some_rect(), prop_oneof![Just(0), any::<u64>()])
            .prop_map(|(id, rect, offset)| transfer_to_host_2d(id, rect, offset)),
        (id(), some_rect()).prop_map(|(id, rect)| flush(id, rect)),
        (id(), any::<u64>(), entry).prop_map(|(id, size, entry)| create_blob(id, size & 0xfff, &[entry])),
        job_command(),
        any::<u32>().prop_map(get_capset_info),
        (any::<u32>(), any::<[u8; 40]>()).prop_map(|(kind, payload)| raw(kind, &payload)),
    ];
    (valid, prop::option::of(any::<u64>()), prop::option::weighted(0.1, any::<prop::sample::Index>()))
        .prop_map(|(request, fence, cut)| {
            let mut request = match fence {
                Some(fence) => fenced(request, fence),
                None => request,
            };
            if let Some(cut) = cut {
                request.truncate(cut.index(request.len()));
            }
            request
        })
}

fn cursor() -> impl Strategy<Value = Vec<u8>> {
    (id(), id(), any::<bool>()).prop_map(|(scanout, id, moves)| {
        let position = CursorPosition { scanout, x: 1, y: 2 };
        if moves { move_cursor(position, id) } else { update_cursor(position, id, (0, 0)) }
    })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        12 => control().prop_map(Action::Control),
        3 => cursor().prop_map(Action::Cursor),
        4 => (0_usize..5000).prop_map(Action::Step),
        4 => (0_usize..3, any::<bool>()).prop_map(|(which, done)| Action::Finish(which, done)),
        1 => (0_usize..3).prop_map(Action::Answer),
        4 => (0_usize..3).prop_map(Action::Run),
        1 => prop::bool::weighted(0.8).prop_map(Action::Reset),
    ]
}

proptest! {
    #[test]
    fn every_pending_command_comes_out_and_all_quotas_come_back(
        actions in prop::collection::vec(action(), 0..120)
    ) {
        play(actions);
    }

    #[test]
    fn bytes_of_any_kind_are_answered(
        request in prop::collection::vec(any::<u8>(), 0..200), kind in 0x100_u32..0x10e, to_cursor: bool
    ) {
        let mut h = Harness::new();
        let known = raw(kind, &request);
        for request in [request, known] {
            let id = if to_cursor { h.send_cursor(&request) } else { h.send(&request) };
            let out = usize::from(h.response(id).is_some()) + h.jobs.len() + h.asked.drain(..).len();
            prop_assert!(out == 1, "{} ways out", out);
        }
    }
}
