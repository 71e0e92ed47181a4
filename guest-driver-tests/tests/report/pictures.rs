//! Timelines: each is XML, stays within its bounds, and no word lies on another; and it shows the drain that it is about.

use guest_driver_tests::suite::report::svg;
use guest_driver_tests::suite::report::timeline::Timeline;
use guest_driver_tests::suite::report::trace::{Sign, Span, Trace};
use roxmltree::Document;

use super::{find, show};
use crate::sample::results;

fn timeline(id: &str) -> Timeline {
    let case = find(results(), id, "soft");
    Timeline::of(&Trace::of(case.evidence.trace.as_ref().unwrap()).unwrap())
}

/// Where a word is: from left to right, and its base line.
fn words(document: &Document<'_>) -> Vec<(f64, f64, f64, String)> {
    let texts =
        document.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text")));
    let number = |node: roxmltree::Node<'_, '_>, name| node.attribute(name).unwrap().parse::<f64>().unwrap();
    let word = |node: roxmltree::Node<'_, '_>| {
        let said = node.text().unwrap_or_default().to_owned();
        // A monospace character is 0.6 em wide.
        let (x, y) = (number(node, "x"), number(node, "y"));
        (x, x + said.chars().count() as f64 * 6.62, y, said)
    };
    texts.map(word).collect()
}

fn assert_readable(id: &str) -> String {
    let text = svg::render(&timeline(id));
    show(&format!("{id}.svg"), &text);
    let document = Document::parse(&text).unwrap();
    let root = document.root_element();
    let bounds: Vec<f64> =
        root.attribute("viewBox").unwrap().split(' ').map(|part| part.parse().unwrap()).collect();
    let [_, _, width, height] = bounds[..] else { panic!("{bounds:?}") };
    assert!(width == 900.0 && (120.0..=400.0).contains(&height), "{bounds:?}");
    for name in ["title", "desc"] {
        let node = root.children().find(|node| node.tag_name().name() == name).unwrap();
        assert!(!node.text().unwrap().is_empty());
    }
    let words = words(&document);
    for (index, (left, right, base, said)) in words.iter().enumerate() {
        assert!(*left >= 0.0 && *right <= width && *base <= height, "{said:?} leaves the picture");
        for (other_left, other_right, other_base, other) in words.iter().skip(index + 1) {
            let apart = right <= other_left || other_right <= left || (base - other_base).abs() >= 11.0;
            assert!(apart, "{said:?} lies on {other:?}");
        }
    }
    assert!(text.len() < 100_000, "{} bytes", text.len());
    text
}

#[test]
fn every_timeline_is_xml_and_no_word_lies_on_another() {
    for id in ["02-exact-range", "15-unmap-then-remap", "25-correct-driver", "97-nasty"] {
        assert_readable(id);
    }
}

#[test]
fn a_timeline_shows_the_job_that_the_longest_drain_waited_for_and_its_last_step_before_the_ack() {
    let line = timeline("15-unmap-then-remap");
    let drain = &line.drains[line.subject.unwrap()];
    let waited: f64 = drain.at.length();
    assert!(drain.acked && drain.parked.is_some() && waited > 3_000.0, "{drain:?}");
    assert!(line.drains.iter().all(|other| other.parked.is_none() || other.at.length() <= waited));
    let (job, Span { from, to }) = (drain.job.unwrap(), line.window);
    assert!(from < 0.0 && to > drain.at.to && drain.at.from == 0.0, "{:?}", line.window);
    let steps = line.engines.iter().flat_map(|engine| &engine.steps).filter(|step| step.job == job);
    let last = steps.map(|step| step.at.to).fold(0.0, f64::max);
    // The line that must be true: the last step is over before the ack.
    assert!(last > waited / 2.0 && last <= drain.at.to, "{last} and {:?}", drain.at);
    let said = assert_readable("15-unmap-then-remap");
    assert!(said.contains(&format!("its ack waited {:.1} ms for job {job}", waited / 1e3)), "{said}");
    let (inside, all) = line.events;
    assert!(inside > 50 && inside < all && line.not_shown().contains(&format!("{} of {all}", all - inside)));
}

#[test]
fn a_driver_that_was_found_out_is_what_a_timeline_is_about() {
    let line = timeline("25-correct-driver");
    let drain = &line.drains[line.subject.unwrap()];
    assert!(drain.ladder.is_some());
    let verdict = Sign::Verdict(drain.job.unwrap(), "moved".into());
    assert!(line.marks.iter().any(|mark| mark.sign == verdict), "{:?}", line.marks);
    let said = assert_readable("25-correct-driver");
    assert!(said.contains("taken off its engine: MOVED") && said.contains("until eviction"), "{said}");
}
