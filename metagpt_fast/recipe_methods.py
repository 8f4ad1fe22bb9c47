"""From a recipe's tensors to methods: the class that it names, and an instance for the parameters of each tensor."""

from __future__ import annotations

from .errors import RecipeError, suggestion
from .methods import METHODS, Method, find_method
from .recipe_file import RecipeFile
from .recipe_tensors import RecipeTensor
from .untrusted import brief


def find_recipe_method(recipe: RecipeFile) -> type[Method]:
    """Return the class of the method that a recipe names; raises RecipeError with its line if there is none."""
    try:
        return find_method(recipe.merge_method)
    except RecipeError as error:
        got = brief(recipe.merge_method) if error.where == "method" else error.got
        hint = error.hint or suggestion(recipe.merge_method, METHODS)
        where = recipe.where_of("merge_method")
        raise RecipeError(error.what, where=where, got=got, expected=error.expected, hint=hint) from error


class MethodMaker:
    """Methods for the tensors of a recipe: equal parameters give one and the same instance."""

    def __init__(self, recipe: RecipeFile, method: type[Method]) -> None:
        self._recipe = recipe
        self._method = method
        self._fields = {name: spec.field for name, spec in method.specs().items()}
        self._made: dict[tuple[object, ...], Method] = {}

    def method_of(self, tensor: RecipeTensor) -> Method:
        """Return the method with a tensor's parameters: per model one value for all if they agree, else one for each.

        Raises:
            RecipeError: values that each may be do not go together.
        """
        own = [each.parameters for each in tensor.inputs if each.parameters]
        values: dict[str, object] = {self._fields[name]: value for name, value in tensor.parameters.items()}
        for name in own[0] if own else ():
            per_model = tuple(parameters[name] for parameters in own)
            values[self._fields[name]] = per_model[:1] if len(set(per_model)) == 1 else per_model
        key = tuple(values.items())
        if key not in self._made:
            try:
                self._made[key] = self._method(**values)
            except RecipeError as error:
                where = f"{self._recipe.where_of('parameters')}, tensor {brief(tensor.name)}, {error.where}"
                raise RecipeError(
                    error.what, where=where, got=error.got, expected=error.expected, hint=error.hint
                ) from error
        return self._made[key]
