//! The page: every case is linked, links lead somewhere, what others said is text, nothing is fetched and nothing runs,
//! and it stays small.

use std::collections::BTreeSet;
use std::time::Duration;

use guest_driver_tests::suite::report::{html, places, told};
use guest_driver_tests::suite::results::{Case, Evidence, Outcome, Results};
use html5gum::{StringReader, Token, Tokenizer};

use super::{cleaned, show};
use crate::sample::{self, results};

/// What a page is made of, as a browser's tokenizer sees it.
#[derive(Default)]
struct Seen {
    tags: BTreeSet<String>,
    ids: Vec<String>,
    /// Value of `href`, class of the element.
    links: Vec<(String, String)>,
    sources: Vec<String>,
    attributes: BTreeSet<String>,
    text: String,
    unclosed: Vec<String>,
}

fn look(page: &str) -> Seen {
    let mut seen = Seen::default();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let is_void = |name: &str| matches!(name, "meta" | "img" | "br" | "link");
    for token in Tokenizer::<StringReader<'_>>::new(page) {
        match token.unwrap() {
            Token::StartTag(tag) => {
                let name = text(&tag.name);
                let get = |wanted: &str| {
                    let found = tag.attributes.iter().find(|(name, _)| text(name) == wanted);
                    found.map(|(_, value)| text(value))
                };
                seen.attributes.extend(tag.attributes.keys().map(|name| text(name)));
                seen.ids.extend(get("id"));
                seen.sources.extend(get("src"));
                seen.links.extend(get("href").map(|link| (link, get("class").unwrap_or_default())));
                if !is_void(&name) && !tag.self_closing {
                    seen.unclosed.push(name.clone());
                }
                seen.tags.insert(name);
            }
            Token::EndTag(tag) => assert_eq!(seen.unclosed.pop(), Some(text(&tag.name))),
            Token::String(said) => seen.text.push_str(&text(&said)),
            Token::Doctype(_) => {}
            Token::Comment(comment) => panic!("a comment: {comment:?}"),
            Token::Error(error) => panic!("{error:?}"),
        }
    }
    seen
}

fn page() -> (&'static str, Seen) {
    static PAGE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let page = PAGE.get_or_init(|| html::render(results()));
    show("report.html", page);
    (page, look(page))
}

#[test]
fn every_case_has_a_cell_that_leads_to_what_it_left() {
    let (_, seen) = page();
    let cells: Vec<_> = seen.links.iter().filter(|(_, class)| class.starts_with("cell ")).collect();
    assert_eq!(cells.len(), results().cases.len());
    let ids: BTreeSet<_> = seen.ids.iter().collect();
    assert_eq!(ids.len(), seen.ids.len(), "an id is there twice");
    for case in &results().cases {
        let place: String =
            case.place().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let cell = (format!("#{}--{place}", case.id()), format!("cell {}", told(&case.outcome).0));
        assert!(cells.contains(&&cell), "{cell:?} is missing");
    }
    for (link, _) in &seen.links {
        let target = link.strip_prefix('#').unwrap_or_else(|| panic!("{link} leads out of the page"));
        assert!(ids.iter().any(|id| *id == target), "{link} leads nowhere");
    }
}

#[test]
fn nothing_is_fetched_and_nothing_runs() {
    let (page, seen) = page();
    for tag in
        ["script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "use", "image"]
    {
        assert!(!seen.tags.contains(tag), "{tag}");
    }
    assert!(
        seen.attributes.iter().all(|name| !name.starts_with("on") && name != "srcset"),
        "{:?}",
        seen.attributes
    );
    assert!(
        !seen.sources.is_empty()
            && seen.sources.iter().all(|source| source.starts_with("data:image/png;base64,"))
    );
    assert!(page.contains("default-src 'none'") && !page.contains("@import") && !page.contains("url("));
}

#[test]
fn what_others_said_is_text_and_all_of_it_is_there() {
    let (page, seen) = page();
    assert!(seen.unclosed.is_empty(), "{:?}", seen.unclosed);
    assert!(!page.contains("<script") && !page.contains("<!--"));
    assert!(
        !page.contains(|character: char| character.is_control() && character != '\n' && character != '\t')
    );
    // The message, a report, a note, the console, the log, each as it was said.
    let nasty = cleaned();
    for said in [
        format!("{nasty}\nsecond line {nasty}"),
        format!("Violation 1: {nasty}\n  job 1"),
        format!("log {nasty}\n"),
        "the last line of the console".to_owned(),
        "Text of others stays text: <b>&amp;</b>.".to_owned(),
        "<double & unmap>".to_owned(),
    ] {
        assert!(seen.text.contains(&said), "{said:?} is missing");
    }
    for place in places(results()) {
        assert!(seen.text.contains(&place), "{place}");
    }
}

#[test]
fn what_did_not_pass_comes_first_and_skips_stand_under_their_reason() {
    let (_, seen) = page();
    let at = |text: &str| seen.text.find(text).unwrap_or_else(|| panic!("{text:?} is missing"));
    assert!(at("What did not pass, or not at once") < at("Timelines of what passed"));
    assert!(at("Timelines of what passed") < at("Skipped, and why"));
    // Once for all of its cases; the timeline of each case that has a trace.
    assert_eq!(seen.text.matches("A real VT-d rounds ranges: only the soft guest can show it.").count(), 1);
    assert_eq!(seen.text.matches("events are not shown.").count(), 2 * 4);
    assert!(
        seen.text.contains("got away") && seen.text.contains("A late touch is over within microseconds.")
    );
}

#[test]
fn a_run_for_the_score_alone_says_how_many_bugs_got_away() {
    let score = Results { cases: Vec::new(), ..results().clone() };
    let seen = look(&html::render(&score));
    assert!(seen.text.contains("1 of 8 seeded bugs got away") && !seen.text.contains("Scenarios and places"));
    for (link, _) in &seen.links {
        assert!(seen.ids.iter().any(|id| link.strip_prefix('#') == Some(id)), "{link} leads nowhere");
    }
}

#[test]
fn a_page_stays_small_however_much_was_said_and_says_what_it_leaves_out() {
    let (small, _) = page();
    assert!(small.len() < 1 << 20, "{}", small.len());
    let loud = |index: u32| {
        let outcome =
            if index.is_multiple_of(2) { Outcome::Passed } else { Outcome::Failed("m".repeat(100_000)) };
        let evidence = Evidence {
            console: "console\n".repeat(20_000),
            backend_log: "log\n".repeat(50_000),
            reports: vec!["r".repeat(50_000); 8],
            screenshot: Some(vec![7; 400_000]),
            ..Evidence::default()
        };
        Case {
            took: Duration::from_secs(70),
            evidence,
            ..sample::case((index, "loud", "Loud", "."), None, outcome)
        }
    };
    let many = Results { cases: (0..200).map(loud).collect(), ..results().clone() };
    let page = html::render(&many);
    assert!(page.len() < 6 << 20, "{}", page.len());
    assert!(page.contains("is left out: the page would become too large."));
    assert_eq!(look(&page).links.iter().filter(|(_, class)| class.starts_with("cell ")).count(), 200);
}
