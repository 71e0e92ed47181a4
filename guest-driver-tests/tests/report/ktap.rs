//! A strict reader of KTAP, written from the document and not from the writer.

/// A test as it was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Test {
    pub(crate) ok: bool,
    pub(crate) name: String,
    pub(crate) directive: Option<(String, String)>,
    pub(crate) subtests: Vec<Test>,
    pub(crate) diagnostics: Vec<String>,
}

/// The tests of a document. Panics at whatever is not of the form.
pub(crate) fn read(text: &str) -> Vec<Test> {
    assert!(text.ends_with('\n'));
    let mut lines = text.lines().peekable();
    let tests = level(&mut lines, 0, &mut Vec::new());
    assert_eq!(lines.next(), None);
    tests
}

type Lines<'a> = std::iter::Peekable<std::str::Lines<'a>>;

fn level(lines: &mut Lines<'_>, depth: usize, leading: &mut Vec<String>) -> Vec<Test> {
    let indent = " ".repeat(2 * depth);
    assert_eq!(lines.next(), Some(format!("{indent}KTAP version 1").as_str()));
    let (mut plan, mut tests, mut subtests, mut diagnostics) = (None, Vec::new(), Vec::new(), Vec::new());
    while let Some(line) = lines.peek().and_then(|line| line.strip_prefix(&indent)) {
        if line == "  KTAP version 1" {
            subtests = level(lines, depth + 1, &mut diagnostics);
            continue;
        }
        lines.next();
        if let Some(said) = line.strip_prefix('#') {
            let said = said.strip_prefix(' ').unwrap_or(said);
            if plan.is_some() { &mut diagnostics } else { &mut *leading }.push(said.to_owned());
        } else if let Some(count) = line.strip_prefix("1..") {
            assert_eq!(plan.replace(count.parse::<usize>().unwrap()), None, "two plans");
        } else {
            let mut test = result(line, tests.len() + 1);
            test.subtests = std::mem::take(&mut subtests);
            test.diagnostics = std::mem::take(&mut diagnostics);
            tests.push(test);
        }
    }
    assert_eq!(plan, Some(tests.len()), "the plan is not kept");
    assert!(subtests.is_empty() && diagnostics.is_empty(), "nothing follows {diagnostics:?}");
    tests
}

/// `ok N name # DIRECTIVE text`
fn result(line: &str, number: usize) -> Test {
    let (ok, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ").unwrap_or_else(|| panic!("{line:?} is no result"))),
    };
    let rest =
        rest.strip_prefix(&format!("{number} ")).unwrap_or_else(|| panic!("{line:?} is not number {number}"));
    let (name, directive) = match rest.split_once(" # ") {
        Some((name, directive)) => (name, Some(directive.split_once(' ').unwrap_or((directive, "")))),
        None => (rest, None),
    };
    assert!(!name.is_empty() && !name.contains('#'), "{name:?} is no name");
    let directive = directive.map(|(what, why)| (what.to_owned(), why.to_owned()));
    if let Some((what, _)) = &directive {
        assert!(
            ["SKIP", "TODO", "XFAIL", "TIMEOUT", "ERROR"].contains(&what.as_str()),
            "{what:?} is no directive"
        );
    }
    Test { ok, name: name.to_owned(), directive, subtests: Vec::new(), diagnostics: Vec::new() }
}
