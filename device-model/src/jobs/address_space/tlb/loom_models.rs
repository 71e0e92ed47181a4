//! A flush against the steps that it has to wait for: what the guest frees when the flush is over, no step touches.

use loom::thread;

use super::*;
use crate::sync::AtomicBool;

const GVA: Gva = Gva::new(0x5000);

/// A page that an entry of the page tables maps, until the driver clears the entry, flushes and frees the page.
struct Page {
    tlb: Arc<Tlb>,
    entry: AtomicU64,
    is_freed: AtomicBool,
}

fn page() -> Arc<Page> {
    let tlb = Arc::new(Tlb::new(TlbConfig::new(TlbPolicy::Sticky, 4)));
    Arc::new(Page { tlb, entry: AtomicU64::new(1), is_freed: AtomicBool::new(false) })
}

impl Page {
    /// A step that uses the page if it finds it. Returns whether a flush may be over now.
    fn step(&self) -> bool {
        let step = self.tlb.begin_step();
        let finds = match self.tlb.lookup(GVA) {
            Lookup::Hit(_) => true,
            Lookup::Miss(start) => self.walk(start),
        };
        if finds {
            assert!(
                !self.is_freed.load(Ordering::SeqCst),
                "a step uses a page that was freed after its flush"
            );
        }
        self.tlb.end_step(step)
    }

    fn walk(&self, start: WalkStart) -> bool {
        let pte = self.entry.load(Ordering::SeqCst);
        if pte != 0 {
            let leaf = Leaf { level: 0, pte };
            let (filled, checked) = (Duration::ZERO, Duration::ZERO);
            let entry = TlbEntry { leaf, host: None, filled, flushes: 0, checked, outdated: None };
            self.tlb.fill(start, GVA, entry, std::iter::empty());
        }
        pte != 0
    }

    /// The driver takes the page away. Returns whether the flush was over at once.
    fn unmap(&self) -> (Flush, bool) {
        self.entry.store(0, Ordering::SeqCst);
        let flush = Tlb::flush(&self.tlb, GVA.page_range(), Flushed::All);
        let is_over = flush.is_over();
        self.is_freed.store(is_over, Ordering::SeqCst);
        (flush, is_over)
    }
}

#[test]
fn what_is_freed_after_its_flush_is_used_by_no_step_and_the_last_step_tells() {
    loom::model(|| {
        let page = page();
        let theirs = Arc::clone(&page);
        let engine = thread::spawn(move || {
            let told = theirs.step();
            theirs.step() || told
        });
        let (flush, was_over) = page.unmap();
        let told = engine.join().unwrap();
        assert!(flush.is_over());
        assert!(was_over || told, "a flush is over, and nothing says so");
        assert!(
            matches!(page.tlb.lookup(GVA), Lookup::Miss(_)),
            "an entry from before the flush is still there"
        );
    });
}

#[test]
fn a_flush_waits_for_the_steps_of_all_engines() {
    loom::model(|| {
        let page = page();
        let engines = [(); 2].map(|()| {
            let page = Arc::clone(&page);
            thread::spawn(move || page.step())
        });
        let (flush, was_over) = page.unmap();
        let told = engines.map(|engine| engine.join().unwrap());
        assert!(flush.is_over() && (was_over || told.contains(&true)));
    });
}
