//! What earlier passes have made: a fragment whose description hasn't changed is not made anew.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use ipnet::IpNet;
use mote_host_api::{PortSpec, SecurityGroupSpec};

use super::ruleset::{Family, Fragment, FragmentKey};
use crate::spec::SpecProblem;

/// All that a fragment follows from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input<'a> {
    /// A port, the number that it has in marks, whether its groups are stateful, and where conntrack is.
    Port(Cow<'a, PortSpec>, u16, bool, Option<Family>),
    /// A group, and where conntrack is.
    Group(Cow<'a, SecurityGroupSpec>, Family),
    /// Addresses of a set, and where conntrack is.
    Set(Cow<'a, BTreeSet<IpNet>>, Family),
}

impl Input<'_> {
    fn into_owned(self) -> Input<'static> {
        match self {
            Self::Port(spec, index, stateful, family) => {
                Input::Port(Cow::Owned(spec.into_owned()), index, stateful, family)
            }
            Self::Group(spec, family) => Input::Group(Cow::Owned(spec.into_owned()), family),
            Self::Set(addresses, family) => Input::Set(Cow::Owned(addresses.into_owned()), family),
        }
    }
}

#[derive(Debug)]
struct Remembered {
    input: Input<'static>,
    fragment: Arc<Fragment>,
    pass: u64,
}

/// Fragments by what they are there for. Only the last pass's are kept.
#[derive(Debug, Default)]
pub struct Memory {
    fragments: HashMap<FragmentKey, Remembered>,
    pass: u64,
}

impl Memory {
    /// Forgets what the pass before the last one has made, and the last one hasn't used.
    pub(crate) fn begin_pass(&mut self) {
        let last = self.pass;
        self.fragments.retain(|_, remembered| remembered.pass == last);
        self.pass += 1;
    }

    /// The fragment of this key, made if it isn't known or followed from something else.
    pub(super) fn fragment(
        &mut self,
        key: FragmentKey,
        input: Input<'_>,
        make: impl FnOnce() -> Result<Fragment, SpecProblem>,
    ) -> Result<Arc<Fragment>, SpecProblem> {
        if let Some(known) = self.fragments.get_mut(&key)
            && known.input == input
        {
            known.pass = self.pass;
            return Ok(known.fragment.clone());
        }
        let fragment = make()?.finish();
        let remembered =
            Remembered { input: input.into_owned(), fragment: fragment.clone(), pass: self.pass };
        self.fragments.insert(key, remembered);
        Ok(fragment)
    }
}
