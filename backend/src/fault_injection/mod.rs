//! Fault injection: known faults of the device, with which a test can show that it would have detected them, and stress
//! for drivers. All threads share the settings, which can be changed while they run: by `--inject` at the start, by the
//! control socket later. A fault that is off costs a load and a branch where it would take effect. Never use them with
//! a guest that matters.
//!
//! One table has names, arguments and explanations (`table`); this module has the settings. The effect of a row is in
//! the code that it concerns: search for its [`Bug`].

pub(crate) mod steps;
mod table;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use table::{Bug, Grade, Kind, Setting, Value};
pub(crate) use table::{SHORT_HELP, long_help, parse};

/// Position of a value's kind in the word of a row that is on.
const KIND: u32 = 61;

/// The state of one row.
#[derive(Debug, Default)]
struct FaultState {
    /// 0: off. Otherwise the encoded argument, see [`encode`].
    word: AtomicU64,
    /// Number of times that it could have taken effect.
    chances: AtomicU64,
    /// Number of times that it took effect.
    hits: AtomicU64,
}

/// The faults that are turned on; shared by reference between threads.
#[derive(Debug)]
pub struct Injection {
    states: [FaultState; table::ROWS.len()],
    dice: AtomicU64,
    /// Where a thread has to panic, for tests of how its session ends.
    #[cfg(test)]
    pub(crate) panics: std::sync::OnceLock<&'static str>,
}

/// A row, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name that turns it on and off.
    pub name: &'static str,
    /// Name and argument as the user writes them.
    pub usage: String,
    /// Its kind: seeded bug or stress.
    pub kind: Kind,
    /// What it does.
    pub help: &'static str,
    /// Its argument if it is on, empty if it takes none.
    pub on: Option<String>,
    /// Number of times that it took effect.
    pub hits: u64,
}

impl Default for Injection {
    fn default() -> Self {
        Self::new(&[])
    }
}

impl Injection {
    /// With these settings turned on.
    pub fn new(settings: &[Setting]) -> Self {
        let this = Self {
            states: std::array::from_fn(|_| FaultState::default()),
            dice: AtomicU64::new(0),
            #[cfg(test)]
            panics: std::sync::OnceLock::new(),
        };
        settings.iter().for_each(|setting| this.turn_on(*setting));
        this
    }

    /// Turns a row on, or changes its argument. Fails without a change if the name or the argument is invalid.
    pub fn set(&self, name: &str, argument: Option<&str>) -> Result<(), String> {
        self.turn_on(Setting::parse(name, argument)?);
        Ok(())
    }

    /// Turns a row off.
    pub fn clear(&self, name: &str) -> Result<(), String> {
        let bug = table::row(name)?.bug;
        // ORDERING: Relaxed, here and in all loads: threads see the change soon, and nothing is ordered by it.
        self.state(bug).word.store(0, Ordering::Relaxed);
        Ok(())
    }

    fn turn_on(&self, setting: Setting) {
        self.state(setting.bug).word.store(encode(setting.value), Ordering::Relaxed);
    }

    fn state(&self, bug: Bug) -> &FaultState {
        // PANIC: each bug has a row, which is checked at compile time.
        &self.states[bug as usize]
    }

    /// Whether it is on.
    #[inline]
    pub fn is_on(&self, bug: Bug) -> bool {
        self.state(bug).word.load(Ordering::Relaxed) != 0
    }

    /// Its argument, if it is on.
    #[inline]
    fn value(&self, bug: Bug) -> Option<Value> {
        let word = self.state(bug).word.load(Ordering::Relaxed);
        if word == 0 { None } else { decode(word) }
    }

    /// Whether the fault takes effect now; if so, it is counted.
    #[inline]
    pub fn fires(&self, bug: Bug) -> bool {
        match self.value(bug) {
            None => false,
            Some(Value::Every(count)) => {
                let chances = self.state(bug).chances.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
                chances.is_multiple_of(count.into()) && self.hit(bug)
            }
            Some(_) => self.hit(bug),
        }
    }

    /// How badly the job hangs now; counted.
    #[inline]
    pub fn grade(&self, bug: Bug) -> Option<Grade> {
        match self.value(bug) {
            Some(Value::Grade(grade)) if self.hit(bug) => Some(grade),
            _ => None,
        }
    }

    /// How long to delay now; counted. `None`: no delay.
    #[inline]
    pub fn delay(&self, bug: Bug) -> Option<Duration> {
        let time = match self.value(bug)? {
            Value::Fixed(time) => time,
            Value::UpTo(most) => self.random(most),
            Value::Plain | Value::Every(_) | Value::Grade(_) => return None,
        };
        self.hit(bug);
        Some(time)
    }

    /// Panics if a test has requested it for this place.
    #[cfg(test)]
    pub(crate) fn panic_if_told(&self, place: &'static str) {
        assert!(self.panics.get() != Some(&place), "Told to panic {place}");
    }

    fn hit(&self, bug: Bug) -> bool {
        self.state(bug).hits.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// A random time. Every process draws the same sequence; which thread gets which number is left to chance.
    fn random(&self, most: Duration) -> Duration {
        // SplitMix64: good enough, and its state is one word that threads can share.
        const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.dice.fetch_add(GAMMA, Ordering::Relaxed).wrapping_add(GAMMA);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let nanoseconds = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX).saturating_add(1);
        Duration::from_nanos((z ^ z >> 31) % nanoseconds)
    }

    /// All rows with their state.
    pub fn list(&self) -> Vec<Listed> {
        let listed = table::ROWS.iter().map(|row| {
            let state = self.state(row.bug);
            Listed {
                name: row.name,
                usage: row.usage(),
                kind: row.kind,
                help: row.help,
                on: self.value(row.bug).map(|value| value.to_string()),
                hits: state.hits.load(Ordering::Relaxed),
            }
        });
        listed.collect()
    }
}

/// Encodes a value as a nonzero word, so that one load tells whether a row is on.
fn encode(value: Value) -> u64 {
    const MOST: u64 = (1 << KIND) - 1;
    // The parser limits times to a minute, which fits easily.
    let time = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(MOST).min(MOST);
    let (kind, argument) = match value {
        Value::Plain => (1, 0),
        Value::Fixed(fixed) => (2, time(fixed)),
        Value::UpTo(most) => (3, time(most)),
        Value::Every(count) => (4, count.into()),
        Value::Grade(grade) => (5, grade as u64),
    };
    kind << KIND | argument
}

fn decode(word: u64) -> Option<Value> {
    let argument = word & ((1 << KIND) - 1);
    let time = Duration::from_nanos(argument);
    match word >> KIND {
        1 => Some(Value::Plain),
        2 => Some(Value::Fixed(time)),
        3 => Some(Value::UpTo(time)),
        4 => u32::try_from(argument).ok().map(Value::Every),
        5 => Grade::ALL.into_iter().find(|grade| *grade as u64 == argument).map(Value::Grade),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_can_be_turned_on_changed_and_turned_off() {
        let injection = Injection::default();
        let on =
            || injection.list().into_iter().filter_map(|row| Some((row.name, row.on?))).collect::<Vec<_>>();
        assert_eq!((injection.is_on(Bug::AckBeforeDrain), injection.delay(Bug::StepDelay)), (false, None));
        injection.set("ack-before-drain", None).unwrap();
        injection.set("step-delay", Some("..5ms")).unwrap();
        injection.set("step-delay", Some("1us")).unwrap();
        assert_eq!(on(), [("ack-before-drain", String::new()), ("step-delay", "1us".to_owned())]);
        assert_eq!(injection.delay(Bug::StepDelay), Some(Duration::from_micros(1)));
        assert!(injection.set("step-delay", None).is_err() && injection.clear("step").is_err());
        injection.clear("ack-before-drain").unwrap();
        assert_eq!(on(), [("step-delay", "1us".to_owned())]);
    }

    #[test]
    fn what_took_effect_is_counted() {
        let injection = Injection::new(&[parse("step-delay=0s").unwrap()]);
        assert_eq!(injection.delay(Bug::StepDelay), Some(Duration::ZERO));
        assert!(!injection.fires(Bug::AckBeforeDrain));
        injection.set("ack-before-drain", None).unwrap();
        assert!(injection.fires(Bug::AckBeforeDrain) && injection.fires(Bug::AckBeforeDrain));
        let hits: Vec<_> = injection.list().into_iter().map(|row| row.hits).collect();
        assert_eq!((hits[Bug::AckBeforeDrain as usize], hits[Bug::StepDelay as usize]), (2, 1));
        assert_eq!(hits.iter().sum::<u64>(), 3);
    }

    #[test]
    fn every_nth_time_is_every_nth_time() {
        let injection = Injection::new(&[parse("lose-fence=3").unwrap()]);
        let strikes: Vec<_> = (0..7).map(|_| injection.fires(Bug::LoseFence)).collect();
        assert_eq!(strikes, [false, false, true, false, false, true, false]);
    }

    #[test]
    fn a_value_is_kept_as_it_is() {
        for text in ["drop-zap", "delay-ack=0s", "delay-ack=1m", "delay-ack=..1m", "lose-fence=4294967295"]
            .into_iter()
            .chain(["hang-job=yielding", "hang-job=stubborn", "hang-job=stuck"])
        {
            let Setting { bug, value } = parse(text).unwrap();
            assert_eq!(Injection::new(&[Setting { bug, value }]).value(bug), Some(value), "{text}");
        }
    }

    #[test]
    fn random_times_reach_from_nothing_to_their_bound_and_are_the_same_every_time() {
        let most = Duration::from_nanos(9);
        let draw = || {
            let injection = Injection::new(&[Setting { bug: Bug::StepDelay, value: Value::UpTo(most) }]);
            (0..200).filter_map(|_| injection.delay(Bug::StepDelay)).collect::<Vec<_>>()
        };
        let times = draw();
        assert_eq!((times.iter().min(), times.iter().max()), (Some(&Duration::ZERO), Some(&most)));
        assert_eq!(times, draw());
    }
}
