use super::*;
use crate::gpu::scanout::CursorPosition;

const AT: CursorPosition = CursorPosition { scanout: 1, x: 10, y: 20 };

#[test]
fn each_misuse_of_the_cursor_gets_its_error_and_changes_nothing() {
    let mut h = Harness::new();
    h.resource(1, 64, 63, 0x10_0000);
    let nowhere = CursorPosition { scanout: 2, ..AT };
    assert_eq!(h.status_of_cursor(&update_cursor(nowhere, 0, (0, 0))), ERR_INVALID_SCANOUT_ID);
    assert_eq!(h.status_of_cursor(&move_cursor(nowhere, 0)), ERR_INVALID_SCANOUT_ID);
    assert_eq!(h.status_of_cursor(&update_cursor(AT, 2, (0, 0))), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status_of_cursor(&update_cursor(AT, 1, (0, 0))), ERR_INVALID_PARAMETER);
    assert!(h.shown.is_empty());
}

#[test]
fn the_pixels_of_a_cursor_become_a8r8g8b8_whatever_their_format() {
    for format in FORMATS {
        let mut h = Harness::new();
        h.memory.fill(ByteRange::new(Iova::new(0x10_0000), 16 << 10).unwrap());
        h.send(&create_2d(1, format, 64, 64));
        h.send(&attach_backing(1, &[(0x10_0000, 16 << 10)]));
        h.send(&transfer_to_host_2d(1, rect(0, 0, 64, 64), 0));
        h.run();
        assert_eq!(h.status_of_cursor(&update_cursor(AT, 1, (3, 4))), OK_NODATA);
        let [DisplayCommand::UpdateCursor { position: AT, hot_x: 3, hot_y: 4, pixels }] = h.shown.as_slice()
        else {
            panic!("{:?}", h.shown)
        };
        let byte = |n: u64| crate::testing::memory::pattern(Iova::new(0x10_0000 + 4 * 100 + n));
        let (zero, one, two, three) = (byte(0), byte(1), byte(2), byte(3));
        let expected = match format {
            1 => [zero, one, two, three],
            2 => [zero, one, two, 255],
            3 => [three, two, one, zero],
            4 => [three, two, one, 255],
            67 => [two, one, zero, three],
            134 => [two, one, zero, 255],
            121 => [one, two, three, zero],
            68 => [one, two, three, 255],
            other => panic!("format {other}"),
        };
        assert_eq!(pixels[400..404], expected);
    }
}

#[test]
fn a_move_shows_the_cursor_with_a_resource_and_hides_it_without() {
    let mut h = Harness::new();
    h.resource(1, 64, 64, 0x10_0000);
    h.send_cursor(&update_cursor(AT, 1, (0, 0)));
    for id in [1, 0, 0, 1] {
        h.send_cursor(&move_cursor(AT, id));
    }
    h.send_cursor(&update_cursor(AT, 0, (0, 0)));
    h.send_cursor(&move_cursor(AT, 1));
    let [
        DisplayCommand::UpdateCursor { .. },
        DisplayCommand::MoveCursor(AT),
        DisplayCommand::HideCursor(AT),
        DisplayCommand::HideCursor(AT),
        DisplayCommand::MoveCursor(AT),
        DisplayCommand::HideCursor(AT),
        DisplayCommand::MoveCursor(AT),
    ] = h.shown.as_slice()
    else {
        panic!("{:?}", h.shown)
    };
}

#[test]
fn a_cursor_that_is_being_drawn_is_shown_when_it_is_done_and_not_overtaken() {
    let mut h = Harness::new();
    h.resource(1, 64, 64, 0x10_0000);
    h.answers();
    let transfer = h.send(&transfer_to_host_2d(1, rect(0, 0, 64, 64), 0));
    let update = h.send_cursor(&update_cursor(AT, 1, (0, 0)));
    let moved = h.send_cursor(&move_cursor(CursorPosition { x: 11, ..AT }, 1));
    let other = h.send_cursor(&move_cursor(CursorPosition { scanout: 0, ..AT }, 1));
    assert_eq!(h.answers(), [(other, OK_NODATA)], "the cursor of another scanout does not wait");
    h.shown.clear();
    h.run();
    assert_eq!(h.answers(), [(transfer, OK_NODATA), (update, OK_NODATA), (moved, OK_NODATA)]);
    let [
        DisplayCommand::UpdateCursor { pixels, .. },
        DisplayCommand::MoveCursor(CursorPosition { scanout: 1, x: 11, y: 20 }),
    ] = h.shown.as_slice()
    else {
        panic!("{:?}", h.shown)
    };
    assert_ne!(pixels[0], 0, "with the pixels of the transfer");
}
