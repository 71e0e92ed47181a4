//! What the terminal says: a whole line a case whoever calls, what went wrong with its message, and the counts alone at
//! the end.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use guest_driver_tests::suite::report::console::Teller;

use crate::sample::results;

/// What was written, kept.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A writer may take as little as it likes.
        let some = bytes.len().min(7);
        self.0.lock().unwrap().extend(&bytes[..some]);
        Ok(some)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn told() -> String {
    let (kept, results) = (Kept::default(), results());
    let teller = Teller::plain(Box::new(kept.clone()));
    teller.begin(results.cases.len());
    std::thread::scope(|scope| {
        for cases in results.cases.chunks(results.cases.len() / 4 + 1) {
            scope.spawn(|| cases.iter().for_each(|case| teller.case(case)));
        }
    });
    teller.end(results);
    String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
}

#[test]
fn each_case_is_a_whole_line_of_its_own_whoever_tells_it() {
    let told = told();
    let mut lines: Vec<&str> = told.lines().take(results().cases.len()).collect();
    lines.sort_unstable();
    for line in [
        "ok      14-overlapping  intel-iommu-lazy  0.6 s",
        "skip    60-swiotlb  soft  There is no kernel in the soft guest.",
        "flaky   32-order-in-a-ring  intel-iommu-strict  1.3 s  The fence of job 9 came before that of job 8.",
        "FAILED  22-unmapped  intel-iommu-ats  0.9 s  The fence of job 7 signalled success although its second page is not mapped.",
        "BROKEN  49-stop-and-cont  virtio-iommu  1.9 s  QEMU ended with signal 11 before the guest was up.",
    ] {
        assert!(lines.binary_search(&line).is_ok(), "{line:?} is missing in\n{told}");
    }
    let words = ["ok      ", "skip    ", "flaky   ", "FAILED  ", "BROKEN  "];
    assert!(lines.iter().all(|line| words.iter().any(|word| line.starts_with(word))), "{lines:#?}");
}

#[test]
fn the_end_has_each_failure_with_its_message_and_the_counts_alone_in_the_last_line() {
    let told = told();
    let end = &told[told.rfind("skip ").unwrap()..];
    let counts = results().counts();
    let last = format!(
        "{} passed, {} failed, {} skipped",
        counts.passed + counts.flaky,
        counts.failed + counts.broken,
        counts.skipped
    );
    assert_eq!(told.lines().last(), Some(last.as_str()));
    for said in [
        "\nFAILED  22-unmapped  intel-iommu-ats\n    The fence of job 7",
        "\n    Expected an error, and a fault of 0xfffe1000 in the guest's IOMMU log; there was none.\n",
        "\nBROKEN  49-stop-and-cont  virtio-iommu\n    QEMU ended",
        "\nflaky   32-order-in-a-ring  intel-iommu-strict\n    The fence of job 9",
        "\nFlaky, and counted as passed: 1.",
        "\nBroken, and counted as failed: 2.",
        "intel-iommu-ats         12      0       1       0        1",
    ] {
        assert!(end.contains(said), "{said:?} is missing in\n{end}");
    }
    // A guest does not get to write to the terminal of whoever runs it.
    assert!(!told.contains(|character: char| character.is_control() && !matches!(character, '\n' | '\t')));
}
