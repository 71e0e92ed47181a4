use super::*;
use crate::addr::{Access, DomainId};
use crate::mmu::Missing;
use crate::testing::memory::pattern;

fn full(h: &mut Harness, id: u32) -> u64 {
    h.send(&transfer_to_host_2d(id, rect(0, 0, 32, 32), 0))
}

#[test]
fn a_transfer_is_answered_when_its_job_has_ended_and_the_image_holds_the_bytes() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    h.send(&set_scanout(0, 1, rect(0, 0, 32, 32)));
    h.answers();
    let transfer = full(&mut h, 1);
    assert_eq!(h.answers(), []);
    h.run();
    assert_eq!(h.answers(), [(transfer, OK_NODATA)]);
    let [DisplayCommand::SetScanout { source: Some(source), .. }] = h.shown.as_slice() else { panic!() };
    let pixels = source.image.lock();
    assert!(pixels.iter().zip(0x10_0000..).all(|(byte, at)| *byte == pattern(Iova::new(at))));
}

#[test]
fn one_transfer_runs_at_a_time_in_order() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    h.resource(2, 32, 32, 0x20_0000);
    h.answers();
    let (first, second) = (full(&mut h, 1), full(&mut h, 2));
    assert_eq!(h.jobs.len(), 1);
    h.run();
    assert_eq!((h.answers(), h.jobs.len()), (vec![(first, OK_NODATA)], 1));
    h.run();
    assert_eq!((h.answers(), h.jobs.len()), (vec![(second, OK_NODATA)], 0));
}

#[test]
fn flush_unref_detach_and_set_scanout_wait_for_the_transfers_before_them_and_nothing_else_does() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    h.resource(2, 32, 32, 0x20_0000);
    h.answers();
    let one = full(&mut h, 1);
    let flush = h.send(&flush(1, rect(0, 0, 32, 32)));
    let two = full(&mut h, 2);
    let detach = h.send(&detach_backing(2));
    let unref = h.send(&unref(1));
    assert_eq!(h.status(&create_2d(9, B8G8R8X8, 1, 1)), OK_NODATA);
    let show = h.send(&set_scanout(0, 2, rect(0, 0, 32, 32)));
    assert_eq!(h.status(&attach_backing(2, &[(0x30_0000, 4096)])), OK_NODATA);
    h.answers();
    h.run();
    assert_eq!(h.answers(), [(one, OK_NODATA), (flush, OK_NODATA)]);
    h.run();
    assert_eq!(h.answers(), [two, detach, unref, show].map(|command| (command, OK_NODATA)));
}

#[test]
fn a_transfer_reads_the_backing_that_it_was_sent_for() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    full(&mut h, 1);
    let second = full(&mut h, 1);
    h.send(&detach_backing(1));
    h.send(&attach_backing(1, &[(0x90_0000, 4096)]));
    h.run();
    assert_eq!(h.jobs[0].working_set()[0].range.first(), Iova::new(0x10_0000));
    h.run();
    assert_eq!(h.response(second).unwrap().kind(), OK_NODATA);
}

#[test]
fn a_failed_job_is_an_error_of_its_own_command_and_the_ring_goes_on() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    h.answers();
    let (first, second, third) = (full(&mut h, 1), full(&mut h, 1), full(&mut h, 1));
    let range = ByteRange::new(Iova::new(0x10_0000), 4096).unwrap();
    let missing = Missing { space: DomainId::DEVICE, range, access: Access::Read };
    h.finish(JobOutcome::Failed(JobError::Refused(missing)));
    h.finish(JobOutcome::Failed(JobError::Killed));
    h.run();
    assert_eq!(h.answers(), [(first, ERR_UNSPEC), (second, ERR_UNSPEC), (third, OK_NODATA)]);
}

#[test]
fn the_ring_is_bounded_and_a_refusal_changes_nothing() {
    let quotas = Quotas { queued_jobs: 2, ..Quotas::default() };
    let mut h = Harness::with(DeviceConfig { quotas, scanouts: 1, ..DeviceConfig::default() });
    h.resource(1, 32, 32, 0x10_0000);
    full(&mut h, 1);
    full(&mut h, 1);
    assert_eq!(h.status(&transfer_to_host_2d(1, rect(0, 0, 1, 1), 0)), ERR_OUT_OF_MEMORY);
    assert_eq!(h.status(&flush(1, rect(0, 0, 1, 1))), ERR_OUT_OF_MEMORY);
    assert_eq!(h.status(&unref(1)), ERR_OUT_OF_MEMORY);
    assert_eq!(h.status(&detach_backing(1)), ERR_OUT_OF_MEMORY);
    h.run();
    h.run();
    assert_eq!((h.status(&detach_backing(1)), h.status(&unref(1))), (OK_NODATA, OK_NODATA));
}

#[test]
fn fences_go_out_in_order_and_carry_everything_back() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    h.answers();
    let on = |request, fence| in_context(on_ring(fenced(request, fence), 7), 0x0102_0304);
    let slow = h.send(&on(transfer_to_host_2d(1, rect(0, 0, 32, 32), 0), 0x1_2345_6789));
    let error = h.send(&on(unref(77), 3));
    let quick = h.send(&on(create_2d(2, B8G8R8X8, 1, 1), 4));
    let unfenced = h.send(&create_2d(3, B8G8R8X8, 1, 1));
    assert_eq!(h.answers(), [(unfenced, OK_NODATA)]);
    h.run();
    let [(first, response), (second, failed), (third, _)] = h.completed.as_slice() else { panic!() };
    assert_eq!([*first, *second, *third], [slow, error, quick]);
    let header =
        [&[0, 0x11, 0, 0, 3, 0, 0, 0, 0x89, 0x67, 0x45, 0x23, 1, 0, 0, 0][..], &[4, 3, 2, 1, 7, 0, 0, 0]];
    assert_eq!(response.as_bytes(), header.concat());
    assert_eq!((failed.kind(), word(failed, 1), word(failed, 2)), (ERR_INVALID_RESOURCE_ID, 3, 3));
}

#[test]
fn without_its_flag_a_fence_is_not_given_back() {
    let mut h = Harness::new();
    let mut request = create_2d(1, B8G8R8X8, 1, 1);
    request[8..24].fill(0xee);
    let id = h.send(&request);
    assert_eq!(h.response(id).unwrap().as_bytes()[4..], [0; 20]);
}

#[test]
fn reset_hands_back_what_is_pending_and_a_job_from_before_it_is_dropped() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    let mut pending = vec![full(&mut h, 1), full(&mut h, 1)];
    pending.push(h.send(&fenced(transfer_to_host_2d(1, rect(0, 0, 1, 1), 0), 1)));
    pending.push(h.send(&fenced(get_edid(0), 2)));
    pending.push(h.send(&fenced(unref(9), 3)));
    h.answers();
    let mut back = h.device.reset();
    back.sort_unstable();
    assert_eq!(back, pending);
    assert_eq!(h.device.usage(), Usage::default());
    assert_eq!(h.status(&fenced(get_edid(0), 4)), ERR_UNSPEC, "accepted features are gone");

    h.device.set_features(features());
    h.resource(1, 32, 32, 0x10_0000);
    h.answers();
    let new = full(&mut h, 1);
    h.finish(JobOutcome::Done);
    h.answer(h.asked[0].0, DisplayAnswer::Edid(None));
    assert_eq!(h.answers(), [], "neither the old job nor the old question answers anybody");
    h.run();
    assert_eq!(h.answers(), [(new, OK_NODATA)]);
    assert!(h.device.reset().is_empty());
}
