//! Which top-level modules of a crate use each other in a circle, read from the crate's own source. A module in a circle
//! cannot be understood, or tested, without the others. Code that is compiled for tests only does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What each top-level module uses, with the first place where it does.
#[derive(Debug, Default)]
struct Folders(BTreeMap<String, BTreeMap<String, String>>);

/// A module, and where its submodules are.
struct Module {
    /// Its names below the crate: empty for the crate itself.
    path: Vec<String>,
    file: PathBuf,
    folder: PathBuf,
}

/// Each use by which a top-level module of the crate in `source` belongs to a circle, with its place.
pub fn circles(source: &Path) -> Vec<String> {
    let read = |file: &Path| fs::read_to_string(file).ok();
    Folders::of(source, &read).circles()
}

impl Folders {
    fn of(source: &Path, read: &impl Fn(&Path) -> Option<String>) -> Self {
        let mut folders = Self::default();
        let root = Module { path: Vec::new(), file: source.join("lib.rs"), folder: source.to_owned() };
        let mut modules = vec![root];
        while let Some(module) = modules.pop() {
            let text = read(&module.file).unwrap_or_else(|| panic!("{} is not there", module.file.display()));
            let text = without_tests(&text);
            folders.add(&module, &text);
            modules.extend(submodules(&text).into_iter().map(|name| module.submodule(name, read)));
        }
        folders
    }

    fn add(&mut self, module: &Module, text: &str) {
        let Some(folder) = module.path.first() else { return };
        for (line, code) in text.lines().enumerate() {
            for used in used_by(code, module.path.len()).filter(|used| used != folder) {
                let place = format!("{}:{}", module.file.display(), line + 1);
                self.0.entry(folder.clone()).or_default().entry(used).or_insert(place);
            }
        }
    }

    /// All that `folder` uses, directly or not.
    fn reach<'a>(&'a self, folder: &'a str) -> BTreeSet<&'a str> {
        let (mut found, mut left) = (BTreeSet::new(), vec![folder]);
        while let Some(next) = left.pop() {
            let uses = self.0.get(next).into_iter().flat_map(BTreeMap::keys);
            left.extend(uses.map(String::as_str).filter(|used| found.insert(*used)));
        }
        found
    }

    fn circles(&self) -> Vec<String> {
        let uses =
            self.0.iter().flat_map(|(from, uses)| uses.iter().map(move |(to, place)| (from, to, place)));
        let circular = uses.filter(|(from, to, _)| self.reach(to).contains(from.as_str()));
        circular.map(|(from, to, place)| format!("{from} uses {to}: {place}")).collect()
    }
}

impl Module {
    fn submodule(&self, name: &str, read: &impl Fn(&Path) -> Option<String>) -> Self {
        let (flat, folder) = (self.folder.join(format!("{name}.rs")), self.folder.join(name));
        let file = if read(&flat).is_some() { flat } else { folder.join("mod.rs") };
        Self { path: [self.path.as_slice(), &[name.to_owned()]].concat(), file, folder }
    }
}

/// The text without comments, and without modules that are compiled for tests only. Keeps the numbers of lines.
fn without_tests(text: &str) -> String {
    let (mut kept, mut attributes) = (String::new(), String::new());
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or_default();
        let is_test = attributes.contains("test");
        match code.trim() {
            // Tests are the last that a file has (clippy::items_after_test_module).
            item if is_test && is_module(item) && item.ends_with('{') => break,
            item if is_test && is_module(item) => attributes.clear(),
            item if item.starts_with("#[cfg(") => attributes.push_str(item),
            item if item.starts_with("#[") => {}
            _ => {
                attributes.clear();
                kept.push_str(code);
            }
        }
        kept.push('\n');
    }
    kept
}

fn is_module(item: &str) -> bool {
    item.split_whitespace().take(2).any(|word| word == "mod")
}

/// The modules that have a file of their own.
fn submodules(text: &str) -> Vec<&str> {
    let declared =
        text.lines().filter(|line| is_module(line)).filter_map(|line| line.trim().strip_suffix(';'));
    declared.filter_map(|line| line.split_whitespace().next_back()).collect()
}

/// The top-level modules that a line names: behind `crate::`, or behind as many `super::` as the module is deep.
fn used_by(code: &str, depth: usize) -> impl Iterator<Item = String> {
    let supers = format!(" {}", "super::".repeat(depth));
    let behind = [code.split("crate::").skip(1), code.split(supers.as_str()).skip(1)];
    let names = behind.map(|parts| parts.flat_map(first_names).collect::<Vec<_>>());
    names.into_iter().flatten()
}

/// The first name of a path, or of each path of a group.
fn first_names(path: &str) -> Vec<String> {
    let name = |path: &str| path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let names = match path.strip_prefix('{').and_then(|group| group.split('}').next()) {
        Some(group) => group.split(',').map(|path| name(path.trim())).collect(),
        None => vec![name(path)],
    };
    names.into_iter().filter(|name| name.starts_with(char::is_lowercase) && name != "super").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The circles of a crate with these files.
    fn circles_of(files: &[(&str, &str)]) -> Vec<String> {
        let read = |file: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == file);
            found.map(|(_, text)| (*text).to_owned())
        };
        Folders::of(Path::new(""), &read).circles()
    }

    #[test]
    fn no_top_level_module_of_this_crate_is_in_a_circle() {
        assert_eq!(circles(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")), Vec::<String>::new());
    }

    #[test]
    fn a_circle_is_found_in_every_way_to_name_a_module() {
        let library = ("lib.rs", "pub mod a;\nmod b;\n");
        for (path, text) in [
            ("b.rs", "use crate::a::A;"),
            ("b.rs", "\nfn f() { crate::a::f() }"),
            ("b.rs", "use crate::{c::C, a::A};"),
            ("b.rs", "use super::a::A;"),
            ("b/mod.rs", "\nuse super::a::A;"),
        ] {
            let circle =
                circles_of(&[library, ("a/mod.rs", "mod c;"), ("a/c.rs", "use crate::b::B;"), (path, text)]);
            assert_eq!(circle.len(), 2, "{text}");
            assert_eq!(circle[0], "a uses b: a/c.rs:1");
        }
    }

    #[test]
    fn comments_tests_and_uses_in_one_direction_are_no_circle() {
        let library =
            ("lib.rs", "mod a;\nmod b;\n#[cfg(any(test, feature = \"test-utils\"))]\npub mod testing;\n");
        for text in [
            "use super::c;",
            "// crate::a",
            "#[cfg(test)]\nmod tests {\nuse crate::a;\n}",
            "#[cfg(test)]\nmod tests;",
            "#[cfg(test)]\n#[path = \"b_tests.rs\"]\nmod tests;",
        ] {
            let circle = circles_of(&[library, ("a.rs", "use crate::b::B;"), ("b.rs", text)]);
            assert_eq!(circle, Vec::<String>::new(), "{text}");
        }
    }
}
