//! Text from other programs, made safe for a report: no terminal escapes, no characters that XML 1.0 cannot hold or
//! that change how a page reads, and a limited length. Knows nothing of markup: escaping is done by each format.

use std::iter::Peekable;
use std::time::Duration;

/// Replaces a character that is not allowed.
const REPLACED: char = char::REPLACEMENT_CHARACTER;
/// Characters of a headline.
const HEADLINE: usize = 240;

/// The text without terminal escapes, with `\n` as its only line end; what is left of control characters is replaced.
pub fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.next() {
        match next {
            '\x1b' => skip_escape(&mut rest),
            '\r' => {
                if rest.peek() != Some(&'\n') {
                    clean.push('\n');
                }
            }
            '\n' | '\t' => clean.push(next),
            _ if is_unfit(next) => clean.push(REPLACED),
            _ => clean.push(next),
        }
    }
    clean
}

/// Control characters, XML noncharacters, characters that only some readers treat as a line end, and those that
/// change the direction of the text around them.
fn is_unfit(character: char) -> bool {
    let turns = matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || turns || matches!(character, '\u{fffe}' | '\u{ffff}')
}

/// What follows an ESC: a control sequence (`[31m`), an operating system command (`]0;title BEL`), or one character.
fn skip_escape(rest: &mut Peekable<impl Iterator<Item = char>>) {
    match rest.next() {
        Some('[') => {
            // Parameters are below '@', and the end is not; a line end is never part of one.
            while rest.next_if(|next| (' '..='?').contains(next)).is_some() {}
            let _ = rest.next_if(|next| ('@'..='~').contains(next));
        }
        Some(']') => {
            while rest.next_if(|next| !matches!(next, '\x07' | '\x1b' | '\n')).is_some() {}
            // Ends with BEL, or with ESC \.
            if rest.next_if_eq(&'\x07').is_none() && rest.next_if_eq(&'\x1b').is_some() {
                let _ = rest.next_if_eq(&'\\');
            }
        }
        _ => {}
    }
}

/// The text as one clean line.
pub fn one_line(text: &str) -> String {
    clean(text).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The first line that is not empty, clean, and short enough for a line.
pub fn headline(text: &str) -> String {
    let text = clean(text);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    match line.char_indices().nth(HEADLINE) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or(line)),
        None => line.to_owned(),
    }
}

/// The beginning of a foreign text, clean, with a line that says what is missing.
pub fn beginning(text: &str, most: usize) -> String {
    let text = clean(text);
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    match text.split_at(end) {
        (whole, "") => whole.to_owned(),
        (begin, rest) => format!("{begin}\n[{} bytes behind this are left out]", rest.len()),
    }
}

/// The end of a clean text: whole lines where possible, at most `most` bytes. Also returns how many bytes are
/// missing.
pub fn end_of(text: &str, most: usize) -> (usize, &str) {
    let earliest = text.len().saturating_sub(most);
    let from = (earliest..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    let (before, end) = text.split_at(from);
    if before.is_empty() || before.ends_with('\n') {
        return (from, end);
    }
    match end.split_once('\n') {
        Some((half, lines)) if !lines.is_empty() => (from + half.len() + 1, lines),
        _ => (from, end),
    }
}

/// The end of a foreign text, clean, with a line that says what is missing.
pub fn excerpt(text: &str, most: usize) -> String {
    let text = clean(text);
    match end_of(&text, most) {
        (0, whole) => whole.to_owned(),
        (missing, end) => format!("[{missing} bytes before this are left out]\n{end}"),
    }
}

/// How long something took: seconds, with tenths if it was short.
pub fn took(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_escapes_and_control_characters_do_not_get_through() {
        assert_eq!(clean("\x1b[1;31mred\x1b[0m \x1b]0;title\x07x\x1b]8;;a\x1b\\y\x1bcz"), "red xyz");
        assert_eq!(
            clean("a\r\nb\rc\0d\u{7f}\u{9b}e\u{ffff}\tµ"),
            "a\nb\nc\u{fffd}d\u{fffd}\u{fffd}e\u{fffd}\tµ"
        );
        assert_eq!(clean("\u{202e}txt.exe"), "\u{fffd}txt.exe");
        assert_eq!(clean("cut \x1b["), "cut ");
        assert_eq!(clean("\x1b[31\nnext"), "\nnext");
    }

    #[test]
    fn an_end_is_of_whole_lines_where_there_are_any() {
        assert_eq!(end_of("one\ntwo\nthree", 100), (0, "one\ntwo\nthree"));
        assert_eq!(end_of("one\ntwo\nthree", 9), (4, "two\nthree"));
        assert_eq!(end_of("one\ntwo\nthree", 7), (8, "three"));
        assert_eq!(end_of("one", 2), (1, "ne"));
        assert_eq!(end_of("µµ", 3), (2, "µ"));
        assert_eq!(excerpt("one\ntwo", 4), "[4 bytes before this are left out]\ntwo");
    }

    #[test]
    fn a_headline_is_the_first_line_that_says_something() {
        assert_eq!(headline("\n  \n  It broke.\nMore."), "It broke.");
        assert_eq!(one_line(" a\n b\tc "), "a b c");
        assert_eq!(headline(""), "");
        assert_eq!(headline(&"µ".repeat(300)), "µ".repeat(240) + "…");
    }

    #[test]
    fn a_beginning_says_what_is_missing() {
        assert_eq!(beginning("whole", 5), "whole");
        assert_eq!(beginning("aµµ", 4), "aµ\n[2 bytes behind this are left out]");
    }
}
