//! Faults that the driver answers: those that jobs have raised, the commands that fetch them, and which answer belongs to
//! which. No fault is dropped: each belongs to a parked job, and of jobs there is a quota. Knows who waits for what; knows
//! nothing of page tables or of the schedule.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};

use job_stream::AsFault;

use crate::addr::Asid;
use crate::gpu::context::ContextId;
use crate::gpu::error::CommandError;
use crate::jobs::address_space::{AddressSpace, FaultKind, GvaAccess};
use crate::jobs::schedule::FaultedJob;

/// The faults of all address spaces whose drivers answer them. `C` is a call that fetches one.
#[derive(Debug)]
pub(crate) struct Faults<C> {
    handlers: BTreeMap<Asid, Handler<C>>,
    /// The number of the next fault: never reset.
    next: u64,
}

/// What answers the faults of an address space.
#[derive(Debug)]
struct Handler<C> {
    context: ContextId,
    space: Weak<AddressSpace>,
    /// Calls that wait for a fault, and faults that wait for a call, oldest first. One of the two is empty.
    fetches: VecDeque<C>,
    raised: VecDeque<(u64, FaultedJob)>,
    /// Faults that the driver has fetched and not answered.
    fetched: BTreeMap<u64, FaultedJob>,
}

impl<C> Faults<C> {
    pub(crate) fn new() -> Self {
        Self { handlers: BTreeMap::new(), next: 0 }
    }

    /// The driver of this address space, which is new, answers faults.
    pub(crate) fn open(&mut self, asid: Asid, context: ContextId, space: &Arc<AddressSpace>) {
        let (fetches, raised) = (VecDeque::new(), VecDeque::new());
        let handler =
            Handler { context, space: Arc::downgrade(space), fetches, raised, fetched: BTreeMap::new() };
        self.handlers.insert(asid, handler);
    }

    /// Whether the driver answers faults of this address space.
    pub(crate) fn check(&self, asid: Asid) -> Result<(), CommandError> {
        let known = self.handlers.contains_key(&asid);
        if known { Ok(()) } else { Err(CommandError::FaultsNotAnswered { asid: asid.raw() }) }
    }

    /// A call waits for the next fault. Afterwards [`Self::next`] may have something.
    pub(crate) fn fetch(&mut self, asid: Asid, call: C) {
        if let Some(handler) = self.handlers.get_mut(&asid) {
            handler.fetches.push_back(call);
        }
    }

    /// A job has raised a fault. Afterwards [`Self::next`] may have something. `Err`: its address space has ended.
    pub(crate) fn raise(&mut self, faulted: FaultedJob) -> Result<(), FaultedJob> {
        let handler = self.handlers.get_mut(&faulted.fault.asid);
        let Some(handler) = handler.filter(|handler| Weak::ptr_eq(&handler.space, &faulted.space)) else {
            return Err(faulted);
        };
        handler.raised.push_back((self.next, faulted));
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    /// A call that can be answered, and its answer.
    pub(crate) fn next(&mut self, asid: Asid) -> Option<(C, AsFault)> {
        let handler = self.handlers.get_mut(&asid)?;
        let call = if handler.raised.is_empty() { None } else { handler.fetches.pop_front() }?;
        let (id, faulted) = handler.raised.pop_front()?;
        let record = record(id, &faulted);
        handler.fetched.insert(id, faulted);
        Some((call, record))
    }

    /// The driver answers this fault, which it has fetched.
    pub(crate) fn answer(&mut self, asid: Asid, id: u64) -> Result<FaultedJob, CommandError> {
        let handler = self.handlers.get_mut(&asid);
        let faulted = handler.and_then(|handler| handler.fetched.remove(&id));
        faulted.ok_or(CommandError::NoSuchFault { asid: asid.raw(), id })
    }

    /// The address space has ended: the calls that wait, and the faults that no driver will answer.
    pub(crate) fn close(&mut self, asid: Asid) -> (VecDeque<C>, Vec<FaultedJob>) {
        let handler = self.handlers.remove(&asid);
        handler.map_or_else(Default::default, |mut handler| {
            (std::mem::take(&mut handler.fetches), handler.take())
        })
    }

    /// The jobs of a context are killed: their faults.
    pub(crate) fn take_all_of(&mut self, context: ContextId) -> Vec<FaultedJob> {
        let handlers = self.handlers.values_mut().filter(|handler| handler.context == context);
        handlers.flat_map(Handler::take).collect()
    }

    /// A reset: the calls that wait.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = C> + use<C> {
        std::mem::take(&mut self.handlers).into_values().flat_map(|handler| handler.fetches)
    }
}

impl<C> Handler<C> {
    fn take(&mut self) -> Vec<FaultedJob> {
        let raised = std::mem::take(&mut self.raised).into_iter().map(|(_, faulted)| faulted);
        raised.chain(std::mem::take(&mut self.fetched).into_values()).collect()
    }
}

fn record(id: u64, faulted: &FaultedJob) -> AsFault {
    let fault = &faulted.fault;
    AsFault {
        id,
        asid: fault.asid.raw(),
        access: match fault.access {
            GvaAccess::Read => 1,
            GvaAccess::Write => 2,
            GvaAccess::Atomic => 3,
        },
        gva: fault.gva.raw(),
        pte: fault.pte,
        level: fault.level,
        denied: u32::from(fault.kind != FaultKind::NotPresent),
        packet: faulted.packet.and_then(|packet| u32::try_from(packet).ok()).unwrap_or(u32::MAX),
        repeats: faulted.repeats,
    }
}
